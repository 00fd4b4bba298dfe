"""``/v1/models``: the one model that is served."""

from __future__ import annotations

from fastapi import APIRouter

from server.api.chat import require_model
from server.api.context import Context, Services
from server.api.errors import replies
from server.api.schemas import ModelList, ModelObject

router = APIRouter(prefix="/v1/models")


@router.get("")
def list_models(services: Context) -> ModelList:
    """All models."""
    return ModelList(data=[_model(services)])


@router.get("/{model_id:path}", responses=replies(404))
def get_model(model_id: str, services: Context) -> ModelObject:
    """One model; ids may hold slashes."""
    require_model(services, model_id)
    return _model(services)


def _model(services: Services) -> ModelObject:
    return ModelObject(id=services.model_name, created=services.started_at, max_model_len=services.spec.max_positions)
