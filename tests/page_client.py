"""The page as a browser speaks to it, over HTTP: events by the name of their component, and what is answered."""

from __future__ import annotations

import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx


class PageClient:
    """One visitor. `messages` has what the server has said, by event."""

    def __init__(self, address: str):
        self.address = address + "gradio_api/"
        self.http = httpx.Client(timeout=60)
        self.config = self.http.get(address + "config").json()
        self.session = uuid.uuid4().hex
        self.components = {component["id"]: component for component in self.config["components"]}
        self.by_name = {component["props"].get("elem_id"): component for component in self.config["components"]}
        self.messages: dict[str, list[dict]] = {}
        self._heard = threading.Condition()
        self._pending: set[str] = set()  # events that are not over, to this client's knowledge
        self._reading = False

    def upload(self, path: Path) -> dict[str, Any]:
        """A file's data as the browser sends it after the upload."""
        with path.open("rb") as file:
            (there,) = self.http.post(self.address + "upload", files={"files": file}).json()
        return {"path": there, "meta": {"_type": "gradio.FileData"}, "orig_name": path.name}

    def dependency(self, name: str, event: str = "click") -> dict[str, Any]:
        target = [self.by_name[name]["id"], event]
        return next(dep for dep in self.config["dependencies"] if target in dep["targets"])

    def start(self, name: str, event: str = "click", event_data: Any = None, **values: Any) -> str:
        """Fires an event of the component of this elem_id, with the page's own values but for those given by elem_id;
        its id."""
        return self._fire(self.dependency(name, event), self.by_name[name]["id"], event_data, values)

    def load(self) -> str:
        """Fires the event of a page that has been loaded, in a browser that remembers nothing; its id."""
        dependency = next(dep for dep in self.config["dependencies"] if "load" in dict(map(reversed, dep["targets"])))
        return self._fire(dependency, None, None, {})

    def _fire(self, dependency: dict, trigger: int | None, event_data: Any, values: dict[str, Any]) -> str:
        inputs = [self.components[number] for number in dependency["inputs"]]
        data = [values.get(part["props"].get("elem_id"), part["props"].get("value")) for part in inputs]
        body = {"data": data, "fn_index": dependency["id"], "session_hash": self.session, "event_data": event_data}
        body["trigger_id"] = trigger
        answer = self.http.post(self.address + "queue/join", json=body)
        answer.raise_for_status()
        number = answer.json()["event_id"]
        with self._heard:
            if not any(message["msg"] == "process_completed" for message in self.messages.setdefault(number, [])):
                self._pending.add(number)
            if not self._reading:
                self._reading = True
                threading.Thread(target=self._read, daemon=True).start()
        return number

    def wait(self, event: str, seconds: float = 60) -> dict:
        """The event's last message, which says that it is over."""
        return self._wait(event, lambda message: message["msg"] == "process_completed", seconds)

    def wait_for(self, event: str, words: str, seconds: float = 60) -> dict:
        """The event's first message with these words."""
        return self._wait(event, lambda message: words in json.dumps(message), seconds)

    def _wait(self, event: str, is_it: Callable[[dict], bool], seconds: float) -> dict:
        """The event's first message that is it. Every message is looked at once, as it comes."""
        deadline, messages = time.monotonic() + seconds, self.messages[event]
        for number in itertools.count():
            with self._heard:
                while number == len(messages):
                    assert self._heard.wait(deadline - time.monotonic()), messages[-3:]
            if is_it(messages[number]):
                return messages[number]

    def said(self, event: str) -> str:
        """All that the event has said so far."""
        return json.dumps(self.messages[event])

    def close(self) -> None:
        """The page is closed."""
        self.http.close()

    def _read(self) -> None:
        """Until nothing is pending: then the server ends the stream, maybe while the next event is on its way to it."""
        while True:
            self._read_stream()
            with self._heard:
                if not self._pending:
                    self._reading = False
                    return

    def _read_stream(self) -> None:
        address = self.address + f"queue/data?session_hash={self.session}"
        with httpx.stream("GET", address, timeout=None) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    message = json.loads(line[6:])
                    if number := message.get("event_id"):
                        with self._heard:
                            self.messages.setdefault(number, []).append(message)
                            self._heard.notify_all()
                            if message["msg"] == "process_completed":
                                self._pending.discard(number)
