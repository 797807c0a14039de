"""The server's log: one line of JSON for each thing that happened, no line that a client made up, no flood."""

import io
import json
import logging

import numpy as np

from triune.data import Observation
from triune.policies import Request
from triune.policies.serve.exchange import Exchange, Refusal, Reply
from triune.policies.serve.logs import JSONLines, Log, Text

REQUEST = Request("c0/evil\n2026 INFO all is well", Observation({}, np.zeros(1), "a secret task"))


def logged(formatter: logging.Formatter, exchanges: list[Exchange], level: int = logging.DEBUG) -> list[str]:
    logger = logging.getLogger("triune.policies.serve.logs")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        log = Log()
        log.happened("started")
        for exchange in exchanges:
            log.exchanged(exchange)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return stream.getvalue().splitlines()


REFUSED = Exchange(REQUEST, 0, 0, None, Refusal("late", "no answer\nwithin 5 ms"), 0.0071)
ANSWERED = Exchange(REQUEST, 0, 0, Reply(np.zeros((1, 1), np.float32), 1.0, 0.0, {}), None, 0.0125)


def test_json_lines_name_event_session_code_and_time() -> None:
    started, answered, refused = map(json.loads, logged(JSONLines(), [ANSWERED, REFUSED]))
    assert (started["event"], started["level"], started["time"][-1]) == ("started", "info", "Z") and "session" not in started
    assert (answered["event"], answered["ms"], answered["session"]) == ("answered", 12.5, REQUEST.session) and "code" not in answered
    assert (refused["event"], refused["level"], refused["code"], refused["ms"]) == ("refused", "warning", "late", 7.1)
    assert "secret" not in json.dumps([started, answered, refused])


def test_text_keeps_clients_from_writing_lines_of_their_own() -> None:
    started, refused = logged(Text(), [ANSWERED, REFUSED], logging.INFO)
    assert started.endswith("INFO started")
    assert refused.endswith(r"WARNING refused c0/evil\x0a2026 INFO all is well as late: no answer\x0awithin 5 ms")


def test_a_flood_of_refusals_is_told_in_few_lines() -> None:
    lines = logged(JSONLines(), [REFUSED] * 500)
    assert 20 <= len(lines) - 1 <= 30
