// All text of an evaluation goes through here, as text: a prompt is never read as HTML.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "circle", "rect", "text"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const known = value => value !== null && value !== undefined;
const number = value => !known(value) ? "?" : Math.abs(value) >= 1000 ? value.toPrecision(4) : value.toFixed(3);
const withError = (value, error) => number(value) + (known(value) && known(error) ? " ± " + number(error) : "");
const size = bytes => !known(bytes) ? "?" : bytes < 1e6 ? (bytes / 1e3).toFixed(1) + " kB" : (bytes / 1e6).toFixed(2) + " MB";
const milliseconds = value => known(value) ? value.toFixed(1) + " ms" : "?";
const metricName = key => key.replace(/,none$/, "");
const nameOf = rank => rank === 0 ? "none" : String(rank);

function aboutTask(found) {
  const higher = found.metrics[found.metric].higher_is_better;
  const better = !known(higher) ? "its task does not say which is better" : higher ? "higher is better" : "lower is better";
  return (found.aurac ? `AURAC ${number(found.aurac.log2)} over log2(rank), ${number(found.aurac.linear)} over the rank; ` : "")
    + `${better}; ${found.items} questions, ${found.num_fewshot || 0} shots.`;
}

// From three marks to eight, at round numbers.
function ticks(low, high) {
  const raw = (high - low) / 3, power = 10 ** Math.floor(Math.log10(raw) + 1e-9);
  const step = [5, 2, 1].map(k => k * power).find(s => s <= raw * (1 + 1e-9));
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return { marks: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// A task's first metric against rank, in an element that holds a .tip; up to two ranks are marked.
function drawCurve(host, evaluation, name, marked = []) {
  const { ranks } = evaluation, task = evaluation.tasks[name], first = task.metrics[task.metric];
  const tip = host.querySelector(".tip");
  const width = Math.max(280, host.clientWidth), height = Math.min(380, Math.max(260, width * 0.5));
  const left = 52, right = 18, top = marked.length ? 48 : 14, bottom = 44;
  const errors = first.stderr.map(error => known(error) ? error : 0);
  const ends = first.value.flatMap((v, i) => known(v) ? [v - errors[i], v + errors[i]] : []);
  if (first.base && known(first.base.value)) ends.push(first.base.value);
  if (!ends.length) ends.push(0, 1);
  let low = Math.min(...ends), high = Math.max(...ends);
  const margin = (high - low || Math.abs(high) || 1) * 0.08;
  low -= margin; high += margin;
  const from = Math.log2(ranks[0]), span = Math.log2(ranks[ranks.length - 1]) - from || 1;
  const inner = width - left - right - 24;
  const along = rank => left + 12 + (ranks.length === 1 ? inner / 2 : (Math.log2(rank) - from) / span * inner);
  const x = i => along(ranks[i]);
  const y = value => top + (high - value) / (high - low) * (height - top - bottom);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${metricName(task.metric)} of ${name} against rank` });
  const { marks, digits } = ticks(low, high);
  for (const value of marks) svg.append(
    make("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
    make("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits)));
  let written = -Infinity;
  ranks.forEach((rank, i) => {
    if (x(i) - written < 24) return;
    written = x(i);
    svg.append(make("text", { x: x(i), y: height - bottom + 20, "text-anchor": "middle" }, String(rank)));
  });
  svg.append(make("text", { x: left + 12 + inner / 2, y: height - 6, "text-anchor": "middle" }, "rank at which the adapter is used"));
  marked.forEach((rank, k) => {
    if (rank < ranks[0] || rank > ranks[ranks.length - 1]) return;
    const at = along(rank), side = at > width / 2 ? "end" : "start", high = 16 + 18 * k;
    svg.append(make("g", { class: k ? "marked second" : "marked", "data-rank": rank },
      make("line", { x1: at, x2: at, y1: high - 10, y2: height - bottom }),
      make("text", { x: at + (side === "end" ? -6 : 6), y: high, "text-anchor": side }, `rank ${rank}`)));
  });
  if (first.base && known(first.base.value)) {
    const at = y(first.base.value);
    svg.append(make("line", { class: "base", x1: left, x2: width - right, y1: at, y2: at }),
      make("text", { class: "basename", x: width - right, y: at > top + 20 ? at - 6 : at + 16, "text-anchor": "end" }, "base model"));
  }
  const there = ranks.map((_, i) => i).filter(i => known(first.value[i]));
  svg.append(make("path", { class: "curve", d: there.map((i, k) => `${k ? "L" : "M"}${x(i)} ${y(first.value[i])}`).join("") }));
  const hide = () => { tip.hidden = true; svg.querySelectorAll(".on").forEach(each => each.classList.remove("on")); };
  there.forEach((i, k) => {
    const start = k ? (x(there[k - 1]) + x(i)) / 2 : left, end = k < there.length - 1 ? (x(i) + x(there[k + 1])) / 2 : width - right;
    const parts = [`rank ${ranks[i]}`, `${withError(first.value[i], first.stderr[i])}`, size(evaluation.bytes?.[i]),
      `${milliseconds(evaluation.latency_ms?.[i])} per token`];
    const above = y(first.value[i] + errors[i]), below = y(first.value[i] - errors[i]);
    const point = make("g", { class: "point", tabindex: 0, role: "img", "aria-label": parts.join(", "), "data-rank": ranks[i] },
      make("rect", { class: "hit", x: start, y: top, width: end - start, height: height - top - bottom }),
      make("line", { x1: x(i), x2: x(i), y1: above, y2: below }),
      make("line", { x1: x(i) - 5, x2: x(i) + 5, y1: above, y2: above }),
      make("line", { x1: x(i) - 5, x2: x(i) + 5, y1: below, y2: below }),
      make("circle", { cx: x(i), cy: y(first.value[i]), r: 6 }));
    const show = () => {
      hide();
      point.classList.add("on");
      tip.textContent = parts.join("\n");
      tip.hidden = false;
      const room = host.clientWidth - tip.offsetWidth;
      const at = y(first.value[i]), upper = at < height / 2;
      tip.style.left = Math.max(0, Math.min(room, x(i) - tip.offsetWidth / 2)) + "px";
      tip.style.top = (upper ? at + 16 : at - 16 - tip.offsetHeight) + "px";
    };
    point.addEventListener("pointerenter", show);
    point.addEventListener("pointerleave", hide);
    point.addEventListener("focus", show);
    point.addEventListener("blur", hide);
    svg.append(point);
  });
  svg.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
  hide();
  host.querySelector("svg")?.remove();
  host.prepend(svg);
}

// Questions as rows of a table, each with the answers of the chosen ranks; equal answers stand together.
function drawRows(body, rows, chosen) {
  body.replaceChildren(...rows.map(row => drawQuestion(row, chosen)));
  // The question is at the end of its prompt, after the shots.
  body.querySelectorAll(".which .text").forEach(text => { text.scrollTop = text.scrollHeight; });
}

function drawQuestion(row, chosen) {
  const groups = new Map();
  for (const rank of chosen) {
    if (!(rank in row.answers)) continue;
    const score = row.scores[rank], key = JSON.stringify([row.answers[rank], score]);
    if (!groups.has(key)) groups.set(key, { ranks: [], answer: row.answers[rank], score });
    groups.get(key).ranks.push(nameOf(Number(rank)));
  }
  const answers = [...groups.values()].map(({ ranks, answer, score }) => {
    const mark = !known(score) ? "" : score === 1 ? " ✓" : score === 0 ? " ✗" : " " + number(score);
    const kind = score === 1 ? "right" : score === 0 ? "wrong" : "";
    return make("div", { class: "answer" }, make("span", { class: kind }, ranks.join(", ") + mark), make("span", { class: "text" }, answer.trim() || "(nothing)"));
  });
  const cell = (name, kind, ...children) => make("td", { "data-name": name, class: kind }, ...children);
  return make("tr", { "data-id": row.id },
    cell(`Question ${row.id}`, "which", make("div", { class: "text" }, row.prompt)),
    cell("Right answer", "", make("div", { class: "text" }, row.target)),
    cell("Answers, by rank", "", ...answers));
}
