"use strict";
// All that comes from captions and files is set as text, never as HTML.
const byId = (id) => document.getElementById(id);
const text = byId("text"), list = byId("pictures"), status = byId("status"), more = byId("more");
const FIRST = 24;
let about = { most_bytes: Infinity, most_pictures: FIRST };
let asked = null; // { text } | { row } | { file }
let latest = 0; // answers that come late are dropped

function make(tag, attributes, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

function say(words, isBad = false) {
  status.textContent = words;
  status.className = isBad ? "bad" : "";
}

function addressOf(query) {
  if (query && query.text) return "/?q=" + encodeURIComponent(query.text);
  return query && "row" in query ? "/?row=" + encodeURIComponent(query.row) : "/";
}

function request(query, k) {
  if (query.file) return fetch("/search?k=" + k, { method: "POST", body: query.file });
  const what = "row" in query ? "row=" + encodeURIComponent(query.row) : "text=" + encodeURIComponent(query.text);
  return fetch("/search?" + what + "&k=" + k);
}

async function answerOf(response) {
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function search(query, k = FIRST) {
  const turn = ++latest;
  asked = query;
  show(query);
  if (query.file && query.file.size > about.most_bytes) {
    list.replaceChildren();
    more.hidden = true;
    return say("The picture is larger than " + Math.floor(about.most_bytes / 2 ** 20) + " MiB.", true);
  }
  list.classList.add("busy");
  say("Searching…");
  try {
    const answer = await answerOf(await request(query, k));
    if (turn !== latest) return;
    const kept = list.contains(document.activeElement) ? [...list.children].findIndex(
      (item) => item.contains(document.activeElement)) : -1;
    list.replaceChildren(...answer.pictures.map(card));
    if (kept >= 0 && k > FIRST) list.children[kept]?.firstChild.focus();
    more.hidden = answer.pictures.length < k || k >= about.most_pictures;
    say(answer.pictures.length + " best of " + about.pictures.toLocaleString("en") + " pictures in "
      + answer.milliseconds + " ms");
  } catch (error) {
    if (turn !== latest) return;
    list.replaceChildren();
    more.hidden = true;
    say(error instanceof TypeError ? "The server does not answer; is dist-siglip search still running?"
      : error.message, true);
  }
  list.classList.remove("busy");
}

function card(found) {
  const image = make("img", { src: found.picture, alt: "", loading: "lazy", decoding: "async" });
  image.onload = () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < 128);
  image.onerror = () => image.classList.add("gone");
  const bar = make("i", {});
  bar.style.width = Math.max(0, Math.min(1, found.score)) * 100 + "%";
  const link = make("a", { href: addressOf({ row: found.row }), title: "Pictures like this one" },
    image, make("span", { className: "score" }, bar),
    make("span", { className: "words", title: found.caption }, found.caption),
    make("span", { className: "from" }, make("span", {}, found.shard + " / " + found.key),
      make("b", { title: "cosine similarity" }, found.score.toFixed(3))));
  return make("li", {}, link);
}

function show(query) {
  const box = byId("asked"), picture = byId("asked-picture");
  if (picture.src.startsWith("blob:")) URL.revokeObjectURL(picture.src);
  box.hidden = !query || !(query.file || "row" in query);
  if (box.hidden) picture.removeAttribute("src");
  else picture.src = query.file ? URL.createObjectURL(query.file) : about.picture + encodeURIComponent(query.row);
  text.value = (query && query.text) || "";
  text.placeholder = box.hidden ? "Describe a picture, or drop one here" : "Pictures like this one";
  byId("examples").hidden = Boolean(query);
  document.title = (query && query.text ? query.text + " · " : "") + (about.name || "Picture search");
}

function ask(query) {
  history.pushState(null, "", addressOf(query));
  search(query);
  window.scrollTo({ top: 0 });
}

function start() {
  const options = new URLSearchParams(location.search);
  if (options.get("q")) return search({ text: options.get("q") });
  if (options.get("row")) return search({ row: options.get("row") });
  latest += 1;
  asked = null;
  list.replaceChildren();
  list.classList.remove("busy");
  more.hidden = true;
  show(null);
  say("");
}

function isPlainClick(event) {
  return event.button === 0 && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey;
}

byId("form").onsubmit = (event) => {
  event.preventDefault();
  if (text.value.trim()) ask({ text: text.value.trim() });
};
byId("file").onchange = (event) => {
  if (event.target.files.length) ask({ file: event.target.files[0] });
  event.target.value = "";
};
byId("choose").onkeydown = (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); byId("file").click(); }
};
byId("clear").onclick = () => { history.pushState(null, "", "/"); start(); text.focus(); };
byId("home").onclick = (event) => {
  if (isPlainClick(event)) { event.preventDefault(); byId("clear").onclick(); }
};
more.onclick = () => search(asked, Math.min(4 * list.children.length, about.most_pictures));
for (const box of [list, byId("examples")]) box.onclick = (event) => {
  const link = event.target.closest("a");
  if (!link || !isPlainClick(event)) return;
  event.preventDefault();
  const options = new URLSearchParams(link.search);
  ask(options.has("row") ? { row: options.get("row") } : { text: options.get("q") });
};
window.onpopstate = start;

// Dropped and pasted pictures.
let depth = 0;
const isFile = (event) => event.dataTransfer && event.dataTransfer.types.includes("Files");
const overlay = (shown) => { byId("drop").hidden = !shown; };
window.ondragenter = (event) => { if (isFile(event)) { event.preventDefault(); depth += 1; overlay(true); } };
window.ondragover = (event) => { if (isFile(event)) event.preventDefault(); };
window.ondragleave = () => { depth = Math.max(0, depth - 1); overlay(depth > 0); };
window.ondrop = (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  depth = 0;
  overlay(false);
  if (event.dataTransfer.files.length) ask({ file: event.dataTransfer.files[0] });
};
window.onpaste = (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) { event.preventDefault(); ask({ file }); }
};

// Keys: "/" to the box, arrows among the pictures.
window.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const links = [...list.querySelectorAll("a")], at = links.indexOf(document.activeElement);
  if (event.key === "/" && document.activeElement !== text) {
    event.preventDefault();
    text.focus();
    text.select();
  } else if (event.key === "ArrowDown" && document.activeElement === text && links.length) {
    event.preventDefault();
    links[0].focus();
  } else if (at >= 0 && event.key.startsWith("Arrow")) {
    event.preventDefault();
    const columns = links.filter((link) => link.offsetTop === links[0].offsetTop).length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    (links[at + step] || (at + step < 0 ? text : links[at])).focus();
  } else if (event.key === "Escape" && at >= 0) text.focus();
};

fetch("/about").then(answerOf).then((answer) => {
  about = answer;
  const method = about.method === "exact" ? "" : ", " + about.method + " index";
  byId("about").textContent = about.name + ": " + about.pictures.toLocaleString("en") + " pictures, "
    + about.dim + " dimensions (" + about.dtype + method + ")";
  byId("examples").append(...about.examples.map(
    (each) => make("a", { href: addressOf({ text: each }) }, each)));
  start();
}).catch(() => say("The server does not answer; is dist-siglip search still running?", true));
