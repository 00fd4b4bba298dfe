// The playground. Everything that comes from the server is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const headers = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});
let asking = null; // the AbortController of the running question
let watching = null; // ... and of the watched upload

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

async function api(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `HTTP ${response.status}`);
  }
  return response;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${String(Math.floor(whole / 60)).padStart(2, "0")}:${String(whole % 60).padStart(2, "0")}`;
}

async function refresh(selected = $("files").value) {
  const { data } = await (await api("/v1/files")).json();
  $("files").replaceChildren(
    ...data.map((file) => new Option(`${file.filename} (${file.status})`, file.id, false, file.id === selected)),
  );
}

function show(file) {
  $("progress").hidden = file.status !== "uploaded";
  $("progress").value = file.video?.progress ?? 0;
  if (file.status === "error") say(`${file.filename}: ${file.status_details}`, true);
  else if (file.status === "processed") say(`${file.filename}: ready, ${file.video.num_chunks} chunks`);
  else say(`${file.filename}: prefilling ${file.video?.chunks_done ?? 0} of ${file.video?.num_chunks ?? "?"} chunks`);
}

async function watch(id) {
  watching?.abort();
  watching = new AbortController();
  const response = await api(`/v1/files/${encodeURIComponent(id)}/events`, { signal: watching.signal });
  for await (const file of events(response)) show(file);
  await refresh(id);
}

function send(file) {
  // fetch cannot report how much has been sent
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file);
    request.open("POST", "/v1/files");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.responseType = "json";
    request.upload.onprogress = (event) => { $("progress").value = event.loaded / event.total; };
    request.onload = () =>
      request.status === 200
        ? resolve(request.response)
        : reject(new Error(request.response?.error?.message ?? `HTTP ${request.status}`));
    request.onerror = () => reject(new Error("The connection broke"));
    request.send(form);
  });
}

function evidenceItem(fileId, item) {
  const entry = document.createElement("li");
  entry.textContent = `${clock(item.start_s)} to ${clock(item.end_s)} (chunk ${item.chunk}, score ${item.score.toFixed(3)})`;
  api(`/v1/files/${encodeURIComponent(fileId)}/chunks/${item.chunk}/thumbnail`)
    .then((response) => response.blob())
    .then((blob) => {
      const image = new Image();
      image.alt = `Frame at ${clock(item.start_s)}`;
      image.onload = () => URL.revokeObjectURL(image.src);
      image.src = URL.createObjectURL(blob);
      entry.append(image);
    })
    .catch(() => {}); // a picture is a nicety: the times stand there already
  return entry;
}

function showEvidence(x2l) {
  const { mixed, low } = x2l.kv_tokens;
  const { score, reload, prefill, decode } = x2l.timings_ms;
  $("facts").textContent =
    `${mixed} KV tokens instead of ${low}${x2l.degraded ? " (degraded)" : ""}; ` +
    `score ${score.toFixed(0)} ms, re-load ${reload.toFixed(0)} ms, prefill ${prefill.toFixed(0)} ms, decode ${decode.toFixed(0)} ms`;
  $("evidence").replaceChildren(...x2l.evidence.map((item) => evidenceItem(x2l.file_id, item)));
}

async function ask(fileId, question) {
  const { data } = await (await api("/v1/models")).json();
  const reload = $("reload").value;
  const response = await api("/v1/chat/completions", {
    method: "POST",
    signal: asking.signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model: data[0].id,
      stream: true,
      messages: [{
        role: "user",
        content: [{ type: "file", file: { file_id: fileId } }, { type: "text", text: question }],
      }],
      ...(reload === "" ? {} : { x2l: { reload: Number(reload) } }),
    }),
  });
  for await (const chunk of events(response)) {
    $("answer").textContent += chunk.choices[0]?.delta.content ?? "";
    if (chunk.x2l) showEvidence(chunk.x2l);
  }
}

$("upload").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    $("progress").hidden = false;
    say("Uploading");
    const file = await send($("file").files[0]);
    await refresh(file.id);
    await watch(file.id);
  } catch (error) {
    $("progress").hidden = true;
    if (error.name !== "AbortError") say(error.message, true);
  }
});

$("files").addEventListener("change", () => {
  watch($("files").value).catch((error) => error.name !== "AbortError" && say(error.message, true));
});

$("delete").addEventListener("click", async () => {
  if (!$("files").value) return;
  try {
    watching?.abort();
    await api(`/v1/files/${encodeURIComponent($("files").value)}`, { method: "DELETE" });
    say("Deleted");
    await refresh("");
  } catch (error) {
    say(error.message, true);
  }
});

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!$("files").value) return say("Upload a video first", true);
  asking?.abort();
  const mine = (asking = new AbortController());
  $("stop").disabled = false;
  $("answer").textContent = $("facts").textContent = "";
  $("evidence").replaceChildren();
  try {
    await ask($("files").value, $("question").value);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  } finally {
    if (asking === mine) $("stop").disabled = true;
  }
});

$("stop").addEventListener("click", () => asking?.abort());
$("key").addEventListener("change", () => refresh().then(() => say(""), (error) => say(error.message, true)));
refresh().catch((error) => say(error.message, true));
