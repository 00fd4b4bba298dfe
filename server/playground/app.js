// The playground. Everything that comes from the server is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const fileUrl = (id, rest = "") => `/v1/files/${encodeURIComponent(id)}${rest}`;
let asking = null; // the AbortController of the running question
let watching = null; // ... and of the watched file

function say(where, text, isError = false) {
  $(where).textContent = text;
  $(where).classList.toggle("error", isError);
}

function report(where, error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) askForKey();
  say(where, error.message, true);
}

// Requests ---------------------------------------------------------------------------------------------------------

const headers = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});

function refusal(status, body) {
  return Object.assign(new Error(body?.error?.message ?? `The server answered with HTTP ${status}.`), { status });
}

function unreachable(error) {
  throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
}

async function api(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } }).catch(unreachable);
  if (!response.ok) throw refusal(response.status, await response.json().catch(() => null));
  return response;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch(unreachable);
    if (done) return;
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw refusal(0, data);
      yield data;
    }
  }
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
      request.status === 200 ? resolve(request.response) : reject(refusal(request.status, request.response));
    request.onerror = () => reject(new Error("The connection broke."));
    request.send(form);
  });
}

// The API key ------------------------------------------------------------------------------------------------------

function askForKey() {
  $("access").hidden = false;
  $("docs").hidden = true; // a link cannot carry the key
  $("key").focus();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await refresh();
    say("key-status", "The key is accepted.");
  } catch (error) {
    report("key-status", error);
  }
});

// Videos -----------------------------------------------------------------------------------------------------------

function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${String(Math.floor(whole / 60)).padStart(2, "0")}:${String(whole % 60).padStart(2, "0")}`;
}

function show(file) {
  const video = file.video;
  $("progress").hidden = file.status !== "uploaded";
  $("progress").value = video?.progress ?? 0;
  if (file.status === "error") {
    say("video-status", `${file.filename} cannot be used: ${file.status_details}`, true);
  } else if (file.status === "uploaded") {
    say("video-status", `Reading the video: ${video ? `${video.chunks_done} of ${video.num_chunks} chunks` : "waiting"}`);
  } else {
    const facts = video ? `: ${clock(video.duration_s)}, ${video.width}×${video.height}, ${video.num_chunks} chunks` : "";
    say("video-status", file.status_details ? `Known${facts}. ${file.status_details}` : `Ready${facts}`);
  }
}

/** Lists the files again, chooses one and shows how it stands. */
async function refresh(chosen = $("files").value) {
  const { data } = await (await api("/v1/files")).json();
  const word = { uploaded: "reading", error: "failed" };
  $("files").replaceChildren(
    ...data.map((file) => {
      const label = word[file.status] ? `${file.filename} (${word[file.status]})` : file.filename;
      return new Option(label, file.id, false, file.id === chosen);
    }),
  );
  $("chosen").hidden = data.length === 0;
  if (data.length) await watch($("files").value);
}

async function watch(id) {
  watching?.abort();
  const mine = (watching = new AbortController());
  const response = await api(fileUrl(id, "/events"), { signal: mine.signal });
  let wasReading = false;
  for await (const file of events(response)) {
    show(file);
    if (wasReading && file.status !== "uploaded") refresh(id).catch((error) => report("video-status", error));
    wasReading = file.status === "uploaded";
  }
}

$("upload").addEventListener("submit", async (event) => {
  event.preventDefault();
  watching?.abort();
  $("send").disabled = true;
  $("progress").hidden = false;
  say("video-status", "Uploading");
  say("ask-status", "");
  let id;
  try {
    ({ id } = await send($("file").files[0]));
  } catch (error) {
    $("progress").hidden = true;
    return report("video-status", error);
  } finally {
    $("send").disabled = false;
  }
  refresh(id).catch((error) => report("video-status", error));
});

$("files").addEventListener("change", () => {
  watch($("files").value).catch((error) => report("video-status", error));
});

$("delete").addEventListener("click", async () => {
  const [option] = $("files").selectedOptions;
  if (!confirm(`Delete ${option.text} and everything made of it?`)) return;
  watching?.abort();
  try {
    await api(fileUrl(option.value), { method: "DELETE" });
    $("progress").hidden = true;
    $("reply").hidden = true;
    say("video-status", "Deleted");
    await refresh("");
  } catch (error) {
    report("video-status", error);
  }
});

// Questions --------------------------------------------------------------------------------------------------------

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function evidenceItem(fileId, item) {
  const entry = document.createElement("li");
  const image = new Image();
  image.alt = `Frame from chunk ${item.chunk}`;
  entry.append(
    image,
    element("strong", `${clock(item.start_s)} to ${clock(item.end_s)}`),
    element("span", `chunk ${item.chunk}, score ${item.score.toFixed(3)}`),
  );
  api(fileUrl(fileId, `/chunks/${item.chunk}/thumbnail`))
    .then((response) => response.blob())
    .then((blob) => {
      image.onload = () => URL.revokeObjectURL(image.src);
      image.src = URL.createObjectURL(blob);
    })
    .catch(() => image.remove()); // a picture is a nicety: the times stand there already
  return entry;
}

function showEvidence({ file_id, evidence, kv_tokens, timings_ms, degraded }) {
  $("evidence").replaceChildren(
    ...(evidence.length
      ? evidence.map((item) => evidenceItem(file_id, item))
      : [Object.assign(element("li", "No chunk was re-loaded."), { className: "none" })]),
  );
  const spent = Object.entries(timings_ms).map(([name, value]) => `${name} ${value.toFixed(0)} ms`);
  $("facts").textContent =
    `${kv_tokens.mixed} KV tokens instead of ${kv_tokens.low}${degraded ? " (degraded)" : ""}; ${spent.join(", ")}`;
}

async function ask(fileId, question, signal) {
  const { data } = await (await api("/v1/models", { signal })).json();
  const reload = $("reload").value;
  const response = await api("/v1/chat/completions", {
    method: "POST",
    signal,
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
    const text = chunk.choices[0]?.delta.content;
    if (text) {
      say("ask-status", "");
      $("reply").hidden = false;
      $("answer").textContent += text;
    }
    if (chunk.x2l) {
      $("reply").hidden = false;
      showEvidence(chunk.x2l);
    }
  }
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  asking?.abort();
  if (!$("files").value) return say("ask-status", "Upload a video first.", true);
  const { signal } = (asking = new AbortController());
  $("stop").disabled = false;
  $("reply").hidden = true;
  $("answer").textContent = $("facts").textContent = "";
  $("evidence").replaceChildren();
  say("ask-status", $("progress").hidden ? "Asking" : "Asking: the answer comes once the video is ready");
  try {
    await ask($("files").value, $("question").value, signal);
    say("ask-status", "");
  } catch (error) {
    if (asking.signal === signal) say("ask-status", "Stopped");
    report("ask-status", error);
  } finally {
    if (asking.signal === signal) $("stop").disabled = true;
  }
});

$("stop").addEventListener("click", () => asking?.abort());

refresh().catch((error) => (error.status === 401 ? askForKey() : report("video-status", error)));
