"use strict";
// The threshold's slider, and the panel of the chosen token. Everything from the model becomes text, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const buttons = [...document.querySelectorAll(".token")];
const slider = document.getElementById("threshold");
const panel = document.getElementById("panel");
const loops = data.tokens[0].loops.length;
let depths = [];
let chosen = -1;

function element(kind, name, ...children) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

// log(1 - sigmoid(gate)), without overflow
const logStay = gate => -Math.max(gate, 0) - Math.log1p(Math.exp(-Math.abs(gate)));

// The first loop with CDF(t) >= q, as looplm.exits.QExit: log S_t <= log(1 - q), which nothing meets at q = 1.
function exitDepth(token, q) {
  let survival = 0;
  for (let loop = 1; loop < loops; loop++) {
    survival += logStay(token.loops[loop - 1].gate);
    if (survival <= Math.log1p(-q)) return loop;
  }
  return loops;
}

function colour() {
  const q = Number(slider.value);
  depths = data.tokens.map(token => exitDepth(token, q));
  buttons.forEach((button, place) => {
    const depth = depths[place];
    button.className = "token d" + depth;
    button.setAttribute("aria-label", button.textContent + ", depth " + depth);
  });
  const mean = depths.reduce((sum, depth) => sum + depth, 0) / depths.length;
  document.getElementById("asked").textContent = String(q);
  document.getElementById("mean").textContent = mean.toFixed(2);
  document.querySelectorAll(".share").forEach((cell, row) => {
    const count = depths.filter(depth => depth === row + 1).length;
    cell.textContent = Math.round(100 * count / depths.length) + "%";
  });
  if (chosen >= 0) show();
}

// One of a loop's best tokens; bars are as long as their share of the token's highest probability in any loop.
function candidate([text, probability, isNext], highest) {
  const percent = (100 * probability).toFixed(1) + " %";
  const bar = element("span", "bar");
  bar.style.width = (100 * probability / highest) + "%";
  const name = element("span", "piece", text);
  if (isNext) name.append(element("span", "tag", "next"));
  return element("li", isNext ? "next" : "", name, element("span", "track", bar), element("span", "percent", percent));
}

function card(reading, loop, depth, highest) {
  const title = element("h4", "", element("span", "swatch d" + loop), "Loop " + loop);
  if (loop === depth) title.append(element("span", "tag", "exits here"));
  if (loop > data.trained) title.append(element("span", "tag", "beyond training"));
  const list = element("ol", "best d" + loop, ...reading.top.map(best => candidate(best, highest)));
  const numbers = reading.numbers.map(([name, value]) =>
    element("div", "", element("dt", "", name), element("dd", "", value)));
  return element("section", loop > depth ? "card later" : "card", title, list, element("dl", "", ...numbers));
}

function show() {
  const token = data.tokens[chosen], depth = depths[chosen], after = data.tokens[chosen + 1];
  document.getElementById("which").textContent = token.text;
  document.getElementById("where").textContent = "Token " + (chosen + 1) + " of " + buttons.length + ", exits after loop "
    + depth + (after ? "; the next token is " : "; the text ends here");
  document.getElementById("following").textContent = after ? after.text : "";
  const highest = Math.max(...token.loops.map(reading => reading.top[0][1]), 1e-9);
  const cards = token.loops.map((reading, index) => card(reading, index + 1, depth, highest));
  document.getElementById("cards").replaceChildren(...cards);
}

// Opens a token, or with -1 none; the one that was chosen last is the one that Tab comes to.
function choose(place) {
  chosen = place;
  buttons.forEach((button, other) => {
    button.setAttribute("aria-pressed", String(other === place));
    if (place >= 0) button.tabIndex = other === place ? 0 : -1;
  });
  panel.classList.toggle("open", place >= 0);
  if (place < 0) return;
  show();
  buttons[place].scrollIntoView({ block: "nearest" });
}

function shut() {
  const back = chosen;
  choose(-1);
  if (back >= 0) buttons[back].focus();
}

function move(event, place) {
  const last = buttons.length - 1;
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -last, End: last };
  if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in steps)) return;
  const to = Math.min(Math.max(place + steps[event.key], 0), last);
  event.preventDefault();
  choose(to);
  buttons[to].focus();
}

buttons.forEach((button, place) => {
  button.addEventListener("click", () => choose(place));
  button.addEventListener("keydown", event => move(event, place));
});
document.getElementById("close").addEventListener("click", shut);
document.addEventListener("keydown", event => { if (event.key === "Escape") shut(); });
slider.addEventListener("input", colour);
document.documentElement.classList.add("live");
colour();
