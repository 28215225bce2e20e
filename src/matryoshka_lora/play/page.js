// The parts of the page that Gradio has not; each is given the element that it fills, and draws what props.value holds.
function drawn(props, watch, draw) {
  watch("value", draw);
  draw();
}

function title(element, props, watch) {
  drawn(props, watch, () => props.value.forEach((text, i) => { element.children[i].textContent = text; }));
}

function slider(element, props, watch) {
  const input = element.querySelector("input");
  const show = () => {
    const { ranks, costs } = props, at = ranks.indexOf(props.value);
    input.value = at;
    input.setAttribute("aria-valuetext", `rank ${props.value}`);
    element.querySelector("b").textContent = props.value;
    element.querySelector(".cost").textContent =
      `${size(costs[at].bytes)} · ${milliseconds(costs[at].milliseconds)} per token, ${costs[at].measured}`;
  };
  input.addEventListener("input", () => { props.value = props.ranks[input.value]; show(); });
  drawn(props, watch, show);
}

function curve(element, props, watch) {
  const draw = () => {
    const { evaluation, task, marked } = props.value;
    element.querySelector("h2").textContent = `${metricName(evaluation.tasks[task].metric)} of ${task} against rank`;
    element.querySelector(".about").textContent = aboutTask(evaluation.tasks[task]);
    drawCurve(element.querySelector(".chart"), evaluation, task, marked);
  };
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== width) requestAnimationFrame(draw);
    width = contentRect.width;
  }).observe(element);
  drawn(props, watch, draw);
}

function changed(element, props, watch) {
  drawn(props, watch, () => {
    const { rows, ranks, differ, asked } = props.value;
    element.querySelector("h2").textContent = `Where ranks ${ranks.join(" and ")} answer differently`;
    element.querySelector(".count").textContent = ranks[0] === ranks[1] ? "Choose two ranks."
      : `${differ} of ${asked} questions` + (rows.length < differ ? `; the first ${rows.length} are shown` : "");
    element.querySelector("table").hidden = !rows.length;
    drawRows(element.querySelector("tbody"), rows, ranks);
  });
}
