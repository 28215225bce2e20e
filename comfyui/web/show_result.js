// Shows the text that a node returns, in a read-only box below its inputs.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const WIDGET = "result";

function showText(node, text) {
  let widget = node.widgets?.find((widget) => widget.name === WIDGET);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app).widget;
    widget.inputEl.readOnly = true;
    widget.serialize = false; // not in the workflow
    widget.options.serialize = false; // not in the request
  }
  widget.value = text;
  const size = node.computeSize();
  node.setSize([Math.max(node.size[0], size[0]), Math.max(node.size[1], size[1])]);
}

app.registerExtension({
  name: "matryoshka-lora.show-result",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Matryoshka")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) showText(this, output.text.join("\n"));
    };
  },
});
