// The gallery's page. The server's word is final: what is decided here is shown at once, sent, and taken back where
// the server refuses. Text from pictures only ever becomes text nodes; the content policy would refuse anything else.
"use strict";

const ROW_GAP = 6, HEAD = 36, AHEAD = 900;
const byId = (id) => document.getElementById(id);
const items = new Map(); // by id, as the server sends them
const cells = new Map(); // by id, those that are mounted
const bands = new Map(); // by number, rows and heads that are mounted
const marked = new Set();
const undone = [];
const natural = new Intl.Collator("en", { numeric: true });
let token = "", rowHeight = 200, layout = [], order = [], place = new Map(), current = null, viewer = null, renders = [];
let total = 0, waiting = false, planned = 0, command = "";

// ---- the server

async function ask(path, value) {
  const answer = await fetch(path, {
    method: "POST", body: JSON.stringify(value),
    headers: { "content-type": "application/json", "x-fluxsplit-token": token },
  });
  const body = (answer.headers.get("content-type") || "").includes("json") ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(body.error || `the gallery answered ${answer.status}`);
  return body;
}

async function enter() {
  const given = location.hash.slice(1);
  const store = sessionStorage;
  if (given) history.replaceState(null, "", "/"); // not into bookmarks and screenshots
  token = given || store.getItem("token") || "";
  try {
    const about = await ask("/api/session", {});
    token = about.token;
    store.setItem("token", token);
    document.title = `${about.folder.split(/[\\/]/).pop()} – fluxsplit gallery`;
    byId("empty").textContent = `No pictures in ${about.folder} yet.\nThey appear here as they are made: fluxsplit preview --prompt "…"`;
  } catch (error) {
    say(byId("empty"), token ? error.message : "Open the address that fluxsplit gallery printed: it ends in a token.");
    return;
  }
  listen();
}

async function listen() {
  for (let wait = 500; ; wait = Math.min(8000, wait * 2)) {
    try {
      const answer = await fetch("/api/events", { headers: { "x-fluxsplit-token": token } });
      if (answer.status === 403) return notice("The gallery was started again. Open the address that it printed.");
      if (answer.ok) {
        wait = 500;
        notice("");
        await follow(answer.body.pipeThrough(new TextDecoderStream()).getReader());
      }
    } catch { /* told below, and tried again */ }
    notice("The gallery does not answer. Is fluxsplit gallery still running?");
    await new Promise((done) => setTimeout(done, wait));
  }
}

async function follow(reader) {
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) take(JSON.parse(part.slice(6)));
  }
}

function take(event) {
  if (event.reset) items.clear();
  for (const item of event.items || []) {
    item.lower = item.prompt.toLowerCase();
    items.set(item.id, item);
    if (cells.has(item.id)) dress(cells.get(item.id), item);
  }
  for (const id of event.gone || []) { items.delete(id); marked.delete(id); }
  if (event.notice !== undefined) notice(event.notice);
  if (event.renders) { renders = event.renders; showRenders(); }
  if (event.items || event.gone || event.reset) {
    sorted = null;
    later();
  }
}

// ---- which pictures, and where: groups by prompt, rows of one height filled to both edges

let sorted = null; // until something comes or goes

function previews() {
  sorted ??= [...items.values()].filter((item) => item.kind === "preview").sort((a, b) => natural.compare(a.name, b.name));
  return sorted;
}

function wanted(item) {
  const words = byId("prompt-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const seed = byId("seed-filter").value.trim(), mark = byId("mark-filter").value;
  return words.every((word) => item.lower.includes(word))
    && (!seed || (item.seed || "").startsWith(seed))
    && item.stars >= Number(byId("star-filter").value)
    && (mark === "all" || item.pick === mark || (mark === "open" && !item.pick && !item.stars)
      || (mark === "kept" && item.pick !== "reject") || (mark === "done" && item.results.length > 0));
}

function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; arrange(); });
}

function arrange() {
  const all = previews();
  const groups = new Map();
  for (const item of all) {
    const key = item.error ? "\0" : item.prompt;
    if (!groups.has(key)) groups.set(key, []);
    if (wanted(item)) groups.get(key).push(item);
  }
  const scroll = byId("scroll"), before = place.get(current);
  const width = byId("grid").clientWidth;
  layout = []; order = []; place = new Map();
  let y = 0;
  for (const [prompt, group] of groups) {
    if (!group.length) continue;
    layout.push({ y, height: HEAD, prompt: prompt === "\0" ? "not readable" : prompt || "no prompt known", count: group.length });
    y += HEAD;
    for (const row of justified(group, width)) {
      layout.push({ y, height: row.height, cells: row.cells });
      for (const cell of row.cells) place.set(cell.id, { y, height: row.height, x: cell.x, width: cell.width, row: layout.length - 1 });
      y += row.height + ROW_GAP;
    }
    order.push(...group.map((item) => item.id));
  }
  total = y;
  byId("grid").style.height = `${y + 12}px`;
  const after = place.get(current);
  if (before && after && before.y >= scroll.scrollTop && before.y <= scroll.scrollTop + scroll.clientHeight) {
    scroll.scrollTop += after.y - before.y; // what is looked at stays where it is when others arrive
  }
  if (!place.has(current)) current = order[0] || null;
  for (const band of bands.values()) band.remove();
  bands.clear();
  mount();
  byId("empty").hidden = order.length > 0;
  if (all.length && !order.length) say(byId("empty"), "No picture passes the filter.");
  byId("shown").textContent = order.length === all.length ? `${all.length} pictures` : `${order.length} of ${all.length} pictures`;
  foot();
  if (viewer) showViewer();
}

function* justified(group, width) {
  let row = [], ratios = 0;
  for (const item of group) {
    const ratio = item.error ? 1 : Math.min(4, Math.max(0.25, item.width / item.height || 1));
    row.push([item.id, ratio]);
    ratios += ratio;
    const height = (width - ROW_GAP * (row.length - 1)) / ratios;
    if (height > rowHeight) continue;
    yield filled(row, height);
    row = []; ratios = 0;
  }
  if (row.length) yield filled(row, Math.min(rowHeight, (width - ROW_GAP * (row.length - 1)) / ratios));
}

function filled(row, height) {
  let x = 0;
  const made = row.map(([id, ratio]) => {
    const cell = { id, x, width: ratio * height };
    x += cell.width + ROW_GAP;
    return cell;
  });
  return { height, cells: made };
}

// ---- the grid: only the rows near the screen are in the page

function mount() {
  const scroll = byId("scroll"), top = scroll.scrollTop - AHEAD, bottom = scroll.scrollTop + scroll.clientHeight + AHEAD;
  for (const [number, band] of bands) {
    const at = layout[number];
    if (at && at.y + at.height >= top && at.y <= bottom) continue;
    band.remove();
    bands.delete(number);
    for (const cell of at?.cells || []) cells.delete(cell.id);
  }
  for (let number = firstBelow(top); number < layout.length && layout[number].y <= bottom; number++) {
    if (!bands.has(number)) {
      const band = layout[number].cells ? rowOf(layout[number]) : headOf(layout[number]);
      bands.set(number, band);
      byId("grid").append(band);
    }
  }
}

function firstBelow(y) {
  let low = 0, high = layout.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (layout[middle].y + layout[middle].height < y) low = middle + 1; else high = middle;
  }
  return low;
}

function headOf(band) {
  const head = make("div", "head", band.prompt);
  head.title = band.prompt;
  head.append(make("small", "", `${band.count}`));
  head.style.top = `${band.y}px`;
  head.style.height = `${band.height}px`;
  return head;
}

function rowOf(band) {
  const row = make("div", "row");
  row.style.top = `${band.y}px`;
  row.style.height = `${band.height}px`;
  for (const { id, x, width } of band.cells) {
    const cell = cells.get(id) || cellOf(items.get(id));
    cells.set(id, cell);
    cell.style.left = `${x}px`;
    cell.style.width = `${width}px`;
    cell.style.height = `${band.height}px`;
    dress(cell, items.get(id));
    row.append(cell);
  }
  return row;
}

function cellOf(item) {
  const cell = make("div", "cell");
  cell.id = `cell-${item.id}`;
  cell.dataset.id = item.id;
  cell.setAttribute("role", "option");
  return cell;
}

function dress(cell, item) {
  const look = [item.version, item.pick, item.stars, item.results.length, item.error, item.seed].join("|");
  cell.className = `cell ${item.pick || ""}${item.id === current ? " current" : ""}${marked.has(item.id) ? " marked" : ""}`;
  cell.setAttribute("aria-selected", String(marked.has(item.id) || item.id === current));
  if (cell.dataset.look === look) return;
  const image = cell.querySelector("img");
  const same = image && cell.dataset.version === item.version ? image : null;
  cell.dataset.look = look;
  cell.dataset.version = item.version;
  cell.setAttribute("aria-label", [item.name, item.pick || "undecided", `${item.stars} stars`, item.prompt].join(", "));
  cell.replaceChildren(item.error ? make("div", "broken", `${item.name}: ${item.error}`) : same || thumbnailOf(item), badgesOf(item));
}

function thumbnailOf(item) {
  const image = make("img");
  image.alt = "";
  image.draggable = false;
  image.decoding = "async";
  image.addEventListener("load", () => {
    if (!performance.getEntriesByName("first picture").length) performance.mark("first picture");
  }, { once: true });
  image.addEventListener("error", () => image.replaceWith(make("div", "broken", `${item.name} cannot be shown`)), { once: true });
  image.src = `/thumbnail/${item.id}?v=${item.version}`;
  return image;
}

function badgesOf(item) {
  const badges = make("div", "badges");
  if (item.pick === "pick") badges.append(make("span", "pickmark", "P"));
  if (item.pick === "reject") badges.append(make("span", "rejectmark", "X"));
  if (item.stars) badges.append(make("span", "stars", "★".repeat(item.stars)));
  if (item.results.length) badges.append(make("span", "result", item.results.length > 1 ? `◧ ${item.results.length}` : "◧"));
  if (!badges.firstChild) badges.classList.add("bare");
  badges.append(make("span", "seed", item.seed === null ? item.name : item.seed));
  return badges;
}

function go(id, scrolling = true) {
  if (!id || !place.has(id)) return;
  const old = current;
  current = id;
  for (const each of [old, id]) if (cells.has(each) && items.has(each)) dress(cells.get(each), items.get(each));
  byId("grid").setAttribute("aria-activedescendant", `cell-${id}`);
  if (!scrolling) return;
  const scroll = byId("scroll"), at = place.get(id), head = layout[at.row - 1]?.cells ? 0 : HEAD;
  if (at.y - head < scroll.scrollTop) scroll.scrollTop = at.y - head;
  else if (at.y + at.height + ROW_GAP > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = at.y + at.height + ROW_GAP - scroll.clientHeight;
  mount();
}

function step(by) {
  const at = order.indexOf(current);
  go(order[Math.min(order.length - 1, Math.max(0, at + by))]);
}

function leap(direction, distance = 0) {
  const from = place.get(current);
  if (!from) return;
  const middle = from.x + from.width / 2;
  for (let row = from.row + direction; row >= 0 && row < layout.length; row += direction) {
    const band = layout[row];
    const last = direction < 0 ? row <= 1 : row === layout.length - 1;
    if (!band.cells || (Math.abs(band.y - from.y) < distance && !last)) continue;
    const off = (cell) => Math.abs(cell.x + cell.width / 2 - middle);
    return go(band.cells.reduce((best, cell) => (off(cell) < off(best) ? cell : best)).id);
  }
}

function toggleMark(id) {
  if (!marked.delete(id)) marked.add(id);
  if (cells.has(id)) dress(cells.get(id), items.get(id));
}

function clearMarks() {
  const old = [...marked];
  marked.clear();
  for (const id of old) if (cells.has(id)) dress(cells.get(id), items.get(id));
}

// ---- decisions

const decisionOf = (item) => ({ id: item.id, pick: item.pick, stars: item.stars });

function targets() {
  if (viewer?.mode === "compare") return [viewer.ids[viewer.at]];
  if (viewer) return [current];
  return marked.size ? [...marked] : [current];
}

function decide(change) {
  const chosen = targets().map((id) => items.get(id)).filter((item) => item && !item.error);
  if (!chosen.length) return;
  const before = chosen.map(decisionOf);
  const after = before.map((decision) => ({ ...decision, ...change(decision, before) }));
  undone.push(before);
  if (undone.length > 500) undone.shift();
  send(after, before);
}

const toggled = (pick) => (_, all) => ({ pick: all.every((decision) => decision.pick === pick) ? null : pick });

function undo() {
  const before = undone.pop();
  if (!before) return toast("nothing to undo");
  const now = before.map((decision) => items.get(decision.id)).filter(Boolean).map(decisionOf);
  send(before.filter((decision) => items.has(decision.id)), now);
  if (place.has(before[0].id)) go(before[0].id);
}

async function send(decisions, before) {
  show(decisions);
  try {
    for (let at = 0; at < decisions.length; at += 1000) await ask("/api/marks", { marks: decisions.slice(at, at + 1000) });
  } catch (error) {
    show(before);
    toast(`not written down: ${error.message}`);
  }
}

function show(decisions) {
  for (const { id, pick, stars } of decisions) {
    const item = items.get(id);
    if (!item) continue;
    Object.assign(item, { pick, stars });
    if (cells.has(id)) dress(cells.get(id), item);
  }
  byId("undo").disabled = !undone.length;
  if (viewer) caption();
  foot();
}

// ---- one picture large, several beside each other, preview and result

function openViewer(mode, ids, real = false) {
  viewer = { mode, ids, at: 0, real, result: 0, edge: 50, shown: "" };
  byId("viewer").hidden = false;
  showViewer();
}

function closeViewer() {
  if (viewer?.mode === "compare") go(viewer.ids[viewer.at]);
  viewer = null;
  byId("viewer").hidden = true;
  byId("panes").replaceChildren();
  byId("scroll").focus({ preventScroll: true });
}

function showViewer() {
  viewer.ids = viewer.ids.filter((id) => items.has(id));
  if (!viewer.ids.length) return closeViewer();
  viewer.at = Math.min(viewer.at, viewer.ids.length - 1);
  const results = items.get(viewer.ids[0]).results;
  const now = JSON.stringify([viewer.mode, viewer.ids.map((id) => [id, items.get(id).version]), viewer.real, viewer.mode === "slide" && results[viewer.result]]);
  if (now !== viewer.shown) {
    viewer.shown = now;
    byId("slider").hidden = viewer.mode !== "slide";
    byId("panes").className = ["", "", "two", "three", "four"][viewer.ids.length];
    byId("panes").replaceChildren(...(viewer.mode === "slide" ? [slideOf()] : viewer.ids.map(paneOf)));
    if (viewer.mode === "slide") moveEdge(viewer.edge);
  }
  [...byId("panes").children].forEach((pane, at) => pane.classList.toggle("current", viewer.mode === "compare" && at === viewer.at));
  caption();
}

function paneOf(id) {
  const item = items.get(id), pane = make("div", `pane ${viewer.real ? "real" : "fit"}`), image = pictureOf(item);
  if (viewer.real) {
    const size = () => { image.style.width = `${item.width / devicePixelRatio}px`; image.style.height = `${item.height / devicePixelRatio}px`; };
    size();
    image.addEventListener("load", () => { pane.scrollTo((pane.scrollWidth - pane.clientWidth) / 2, (pane.scrollHeight - pane.clientHeight) / 2); }, { once: true });
  }
  pane.append(image);
  if (viewer.mode === "compare") pane.append(make("span", "tag", item.seed === null ? item.name : `${item.name}  seed ${item.seed}`));
  pane.addEventListener("scroll", () => together(pane));
  pane.addEventListener("pointerdown", (down) => drag(pane, down));
  return pane;
}

function pictureOf(item) {
  const image = make("img");
  image.alt = item.prompt;
  image.draggable = false;
  image.src = `/picture/${item.id}?v=${item.version}`;
  return image;
}

function together(pane) {
  for (const other of byId("panes").children) {
    if (other === pane || !viewer?.real) continue;
    other.scrollLeft = pane.scrollLeft;
    other.scrollTop = pane.scrollTop;
  }
}

function drag(pane, down) {
  if (viewer.mode === "compare") { viewer.at = [...byId("panes").children].indexOf(pane); showViewer(); }
  if (!viewer.real) return;
  const left = pane.scrollLeft + down.clientX, top = pane.scrollTop + down.clientY;
  const move = (event) => pane.scrollTo(left - event.clientX, top - event.clientY);
  pane.setPointerCapture(down.pointerId);
  pane.addEventListener("pointermove", move);
  pane.addEventListener("pointerup", () => pane.removeEventListener("pointermove", move), { once: true });
}

function slideOf() {
  const item = items.get(viewer.ids[0]), result = items.get(item.results[viewer.result]);
  const slide = make("div", "slide"), before = pictureOf(item);
  before.id = "before";
  const edge = make("div", "edge");
  edge.id = "edge";
  slide.append(pictureOf(result), before, edge, make("span", "tag", `preview ${item.width}x${item.height}`), make("span", "tag after", `${result.name} ${result.width}x${result.height}`));
  const move = (event) => moveEdge(100 * (event.clientX - slide.getBoundingClientRect().left) / slide.clientWidth);
  slide.addEventListener("pointerdown", (event) => { slide.setPointerCapture(event.pointerId); move(event); });
  slide.addEventListener("pointermove", (event) => { if (event.buttons) move(event); });
  return slide;
}

function moveEdge(percent) {
  viewer.edge = Math.min(100, Math.max(0, percent));
  byId("before").style.clipPath = `inset(0 ${100 - viewer.edge}% 0 0)`;
  byId("edge").style.left = `${viewer.edge}%`;
  byId("slider").value = viewer.edge;
}

function caption() {
  const item = items.get(viewer.mode === "compare" ? viewer.ids[viewer.at] : viewer.ids[0]);
  if (!item) return;
  const facts = [item.name, item.seed !== null && `seed ${item.seed}`, `${item.width}x${item.height}`, item.steps && `${item.steps} steps`, item.model, viewer.real && "real size"];
  byId("caption").replaceChildren(badgesOf(item), make("span", "prompt", item.prompt), make("span", "facts", facts.filter(Boolean).join(" · ")));
  byId("caption").firstChild.querySelector(".seed").remove();
  byId("caption").firstChild.className = "";
}

function compare() {
  const at = order.indexOf(current);
  const ids = marked.size ? order.filter((id) => marked.has(id)) : order.slice(at, at + 2);
  const readable = ids.filter((id) => !items.get(id).error);
  if (readable.length < 2 || readable.length > 4) return toast(`2 to 4 pictures can be compared, ${readable.length} ${marked.size ? "marked (Space)" : "left"}`);
  openViewer("compare", readable);
}

function beforeAfter() {
  if (!items.get(current)?.results.length) return toast("this preview has no result yet");
  openViewer("slide", [current]);
}

// ---- renders

function renderSettings() {
  const scale = byId("scale").value, keep = byId("keep").value, upscale = byId("upscale").value;
  return {
    ...(scale === "size" ? { size: byId("size").value.trim() } : { scale: Number(scale) }),
    ...(keep && { keep }), ...(upscale && { upscale: Number(upscale) }),
  };
}

function foot() {
  const count = previews().filter((item) => item.pick === "pick").length;
  byId("picked").textContent = count ? `${count} picked` : "nothing picked";
  byId("render").disabled = byId("copy").disabled = !count;
  clearTimeout(planned);
  planned = setTimeout(showPlan, 200, count);
}

async function showPlan(count) {
  byId("plan").textContent = "";
  if (!count) return;
  try {
    const plan = await ask("/api/plan", renderSettings());
    command = plan.command;
    const time = plan.seconds === null ? "no time known: no sampling was timed here yet" : `about ${duration(plan.seconds)} of sampling`;
    byId("plan").textContent = `→ ${plan.count} at ${plan.sizes.join(", ")}, ${time}`;
    byId("render").textContent = `render ${plan.count}`;
  } catch (error) {
    byId("plan").textContent = error.message;
    byId("render").disabled = byId("copy").disabled = true;
  }
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function showRenders() {
  const box = byId("renders");
  box.hidden = !renders.length;
  box.replaceChildren(...[...renders].reverse().map((run) => {
    const job = make("div", `job ${run.state}`), bar = make("progress");
    bar.max = 1;
    const within = run.state === "running" && run.task ? run.task.share : 0;
    if (run.state !== "running" || run.task || run.results) bar.value = run.state === "done" ? 1 : within;
    const words = { waiting: "waiting", running: `${run.results} of ${run.count} done`, done: `done, ${run.results} of ${run.count}`, failed: "failed", cancelled: "cancelled" };
    const detail = run.state === "running" && run.task ? `${run.task.title}: ${run.task.detail}` : run.line;
    job.append(make("span", "", words[run.state]), bar, make("span", "detail", detail));
    job.title = run.command;
    if (run.state === "waiting" || run.state === "running") {
      const cancel = make("button", "", "cancel");
      cancel.addEventListener("click", () => ask("/api/renders/cancel", { id: run.id }).catch((error) => toast(error.message)));
      job.append(cancel);
    }
    return job;
  }));
}

async function startRender() {
  try {
    await ask("/api/renders", renderSettings());
  } catch (error) {
    toast(error.message);
  }
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText(command);
    toast(`copied: ${command}`);
  } catch {
    toast(command);
  }
}

// ---- words for the person

function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}

function say(place, text) { place.textContent = text; place.hidden = false; }
function notice(text) { byId("notice").textContent = text; byId("notice").hidden = !text; }

let toasted = 0;
function toast(text) {
  say(byId("toast"), text);
  clearTimeout(toasted);
  toasted = setTimeout(() => { byId("toast").hidden = true; }, 4000);
}

// ---- keys and pointer

function moved(key, event) {
  if (viewer?.mode === "slide") {
    if (key === "ArrowLeft" || key === "ArrowRight") moveEdge(viewer.edge + (key === "ArrowLeft" ? -5 : 5));
    else {
      const count = items.get(viewer.ids[0]).results.length;
      viewer.result = (viewer.result + (key === "ArrowUp" ? count - 1 : 1)) % count;
      showViewer();
    }
  } else if (viewer?.mode === "compare") {
    const by = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    viewer.at = (viewer.at + by + viewer.ids.length) % viewer.ids.length;
    showViewer();
  } else {
    if (event.shiftKey && !viewer && !marked.has(current)) toggleMark(current);
    if (key === "ArrowLeft") step(-1);
    else if (key === "ArrowRight") step(1);
    else leap(key === "ArrowUp" ? -1 : 1);
    if (event.shiftKey && !viewer && !marked.has(current)) toggleMark(current);
    if (viewer) { viewer.ids = [current]; showViewer(); }
  }
}

function on() { // to the next one, after a decision with Shift
  if (viewer?.mode === "compare") moved("ArrowRight", {});
  else if (!marked.size || viewer) { step(1); if (viewer) { viewer.ids = [current]; showViewer(); } }
}

function escape() {
  if (!byId("help").hidden) byId("help").hidden = true;
  else if (viewer) closeViewer();
  else clearMarks();
}

function realSize() {
  if (!viewer) return current && !items.get(current).error && openViewer("view", [current], true);
  if (viewer.mode === "slide") return undefined;
  viewer.real = !viewer.real;
  return showViewer();
}

const KEYS = {
  ArrowLeft: (event) => moved("ArrowLeft", event), ArrowRight: (event) => moved("ArrowRight", event),
  ArrowUp: (event) => moved("ArrowUp", event), ArrowDown: (event) => moved("ArrowDown", event),
  Home: () => !viewer && go(order[0]), End: () => !viewer && go(order[order.length - 1]),
  PageUp: () => !viewer && leap(-1, byId("scroll").clientHeight - rowHeight), PageDown: () => !viewer && leap(1, byId("scroll").clientHeight - rowHeight),
  Enter: () => (viewer ? closeViewer() : current && !items.get(current).error && openViewer("view", [current])),
  " ": () => !viewer && current && toggleMark(current),
  Escape: escape,
  p: (event) => { decide(toggled("pick")); if (event.shiftKey) on(); },
  x: (event) => { decide(toggled("reject")); if (event.shiftKey) on(); },
  z: realSize, c: () => (viewer?.mode === "compare" ? closeViewer() : !viewer && compare()),
  b: () => (viewer?.mode === "slide" ? closeViewer() : !viewer || viewer.mode === "view" ? beforeAfter() : undefined), u: undo,
  "+": () => resize(1.25), "=": () => resize(1.25), "-": () => resize(0.8),
  "/": () => { if (!viewer) { byId("prompt-filter").focus(); byId("prompt-filter").select(); } },
  "?": () => { byId("help").hidden = !byId("help").hidden; },
};

function resize(factor) {
  rowHeight = Math.min(600, Math.max(80, rowHeight * factor));
  cells.clear();
  arrange();
  go(current);
}

function pressed(event) {
  const typing = event.target.matches("input:not([type=range]), select, textarea");
  if (typing) {
    if (event.key === "Escape" || (event.key === "Enter" && event.target.type === "search")) { byId("scroll").focus(); event.preventDefault(); }
    return;
  }
  if (event.altKey || event.metaKey || (event.ctrlKey && event.key.toLowerCase() !== "z")) return;
  const button = event.target.closest("button");
  if (button && (event.key === "Enter" || event.key === " ")) return;
  const digit = /^(?:Digit|Numpad)([0-5])$/.exec(event.code);
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey) undo();
  else if (digit && (event.key === digit[1] || event.shiftKey)) {
    decide(() => ({ stars: Number(digit[1]) }));
    if (event.shiftKey) on();
  } else if (Object.hasOwn(KEYS, key)) KEYS[key](event);
  else return;
  event.preventDefault();
}

document.addEventListener("keydown", pressed);
byId("scroll").addEventListener("scroll", () => requestAnimationFrame(mount), { passive: true });
byId("grid").addEventListener("click", (event) => {
  const id = event.target.closest(".cell")?.dataset.id;
  if (!id) return;
  go(id, false);
  if (event.ctrlKey || event.metaKey) toggleMark(id);
  byId("scroll").focus({ preventScroll: true });
});
byId("grid").addEventListener("dblclick", (event) => { if (event.target.closest(".cell")) KEYS.Enter(); });
for (const id of ["prompt-filter", "seed-filter"]) byId(id).addEventListener("input", () => { byId("scroll").scrollTop = 0; later(); });
for (const id of ["mark-filter", "star-filter"]) byId(id).addEventListener("change", () => { byId("scroll").scrollTop = 0; later(); byId("scroll").focus(); });
for (const id of ["scale", "keep", "upscale", "size"]) byId(id).addEventListener("input", () => { byId("size").hidden = byId("scale").value !== "size"; foot(); });
byId("slider").addEventListener("input", () => moveEdge(Number(byId("slider").value)));
byId("undo").addEventListener("click", undo);
byId("help-open").addEventListener("click", () => KEYS["?"]());
byId("help").addEventListener("click", escape);
byId("copy").addEventListener("click", copyCommand);
byId("render").addEventListener("click", startRender);
new ResizeObserver(() => { cells.clear(); later(); }).observe(byId("grid"));
byId("scroll").focus();
enter();
