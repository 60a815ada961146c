// Thumbnails of which several can be chosen. props.value is JSON {items: [{key, name, thumbnail}], chosen: [key], from}.
const root = element.querySelector(".picker");

function show() {
  const state = JSON.parse(props.value);
  root.replaceChildren(...state.items.map((item) => {
    const button = document.createElement("button"), image = document.createElement("img");
    const isChosen = state.chosen.includes(item.key);
    button.type = "button";
    button.title = item.name;
    button.dataset.key = item.key;
    button.setAttribute("role", "checkbox");
    button.setAttribute("aria-checked", String(isChosen));
    image.src = item.thumbnail;
    image.alt = item.name;
    const name = document.createElement("span");
    name.textContent = item.name;
    button.append(image, name);
    button.addEventListener("click", () => {
      const now = JSON.parse(props.value);
      now.chosen = isChosen ? now.chosen.filter((key) => key !== item.key) : [...now.chosen, item.key];
      now.from = "picker";
      props.value = JSON.stringify(now);
      show();
    });
    return button;
  }));
}
show();
watch("value", show);
