// The hint of the first visit; a browser that keeps nothing shows it every time.
const welcome = element.querySelector(".welcome");
const KEY = "infinite-world-hint-seen";
const keep = (action) => { try { return action(localStorage); } catch { return null; } };
welcome.hidden = !!keep((storage) => storage.getItem(KEY));
welcome.querySelector("button").addEventListener("click", () => {
  welcome.hidden = true;
  keep((storage) => storage.setItem(KEY, "yes"));
});
