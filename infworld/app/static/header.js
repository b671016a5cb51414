// The hint of the first visit; a browser that keeps nothing shows it every time.
const welcome = element.querySelector(".welcome");
const KEY = "infinite-world-hint-seen";
const keep = (action) => { try { return action(localStorage); } catch { return null; } };
welcome.hidden = !!keep((storage) => storage.getItem(KEY));
welcome.querySelector("button").addEventListener("click", () => {
  welcome.hidden = true;
  keep((storage) => storage.setItem(KEY, "yes"));
});

// Gradio notices that the server was started anew only while the page waits for something. An idle page asks, and loads
// itself again, which brings the film back.
const ASK = 5000; // ms
const serverId = async () => {
  try {
    const answer = await fetch("gradio_api/app_id");
    return answer.ok ? await answer.text() : null;
  } catch {
    return null; // out of reach for now
  }
};
const firstId = serverId();
setInterval(async () => {
  if (document.hidden) return;
  const [before, now] = [await firstId, await serverId()];
  if (before && now && before !== now) window.location.reload();
}, ASK);
