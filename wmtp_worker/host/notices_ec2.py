"""EC2: spot interruptions and rebalance recommendations, by version 2 of the Instance Metadata Service.

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html
"""

import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime

from wmtp_worker.host.metadata import ADDRESS, ANSWER_SECONDS, Answer, Endpoint, Notice, Unavailable

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
MODE = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"
DISABLED = "AWS_EC2_METADATA_DISABLED"

_IPV6 = "http://[fd00:ec2::254]"
_TOKEN_SECONDS = 21_600  # the longest there is


def disabled(environ: Mapping[str, str]) -> bool:
    """Whether the person who runs us wants nobody to ask, as every AWS SDK understands it."""
    return environ.get(DISABLED, "").lower() == "true"


class Ec2:
    """Two minutes before a spot instance goes, `spot/instance-action` appears; until then it is a 404."""

    name = "ec2"

    def __init__(self, environ: Mapping[str, str]) -> None:
        ipv6 = environ.get(MODE, "").lower() == "ipv6"
        self._endpoint = Endpoint((environ.get(ENDPOINT) or (_IPV6 if ipv6 else ADDRESS)).rstrip("/"))
        self._token: str | None = None

    def poll(self) -> list[Notice]:
        if (action := self._get("spot/instance-action")) is not None:
            return [_interruption(action)]
        if (rebalance := self._get("events/recommendations/rebalance")) is not None:
            since = str(rebalance.json().get("noticeTime"))[:30]
            detail = f"a higher risk of interruption, since {since!r}"
            return [Notice("rebalance", self.name, None, detail, certain=False)]
        return []

    def clock(self, seconds: float = ANSWER_SECONDS) -> float:
        return self._token_answer(seconds).moment

    def close(self) -> None:
        self._endpoint.close()

    def item(self, name: str) -> str | None:
        """What is below `meta-data/`, as `instance-id`; None where there is no such item. Raises `Unavailable`."""
        answer = self._get(name)
        return None if answer is None else answer.text

    def _get(self, item: str) -> Answer | None:
        """The item, None where there is no such item. A token that ran out is renewed."""
        renewed = self._token is None
        if self._token is None:
            self._token = self._new_token()
        answer = self._ask(item, self._token)
        if answer.status == 401 and not renewed:
            self._token = self._new_token()
            answer = self._ask(item, self._token)
        if answer.status == 404:
            return None
        if answer.status != 200:
            self._token = None
            raise Unavailable(f"{item}: status {answer.status}")
        return answer

    def _ask(self, item: str, token: str) -> Answer:
        return self._endpoint.ask(f"/latest/meta-data/{item}", {"X-aws-ec2-metadata-token": token})

    def _new_token(self) -> str:
        return self._token_answer(ANSWER_SECONDS).text

    def _token_answer(self, seconds: float) -> Answer:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
        answer = self._endpoint.ask("/latest/api/token", headers, method="PUT", seconds=seconds)
        if answer.status != 200 or not answer.text.isprintable() or not answer.text:
            raise Unavailable(f"no token: status {answer.status}", answered=True)
        return answer


def _interruption(answer: Answer) -> Notice:
    """The notice of `{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`."""
    said = answer.json()
    kind = said.get("action")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise Unavailable(f"an interruption without an action: {answer.text[:60]!r}")
    deadline, detail = None, f"spot interruption, {kind[:20]}"
    with contextlib.suppress(ValueError, TypeError):  # the notice stands, whatever its time
        at = datetime.fromisoformat(said.get("time"))  # type: ignore[arg-type]
        detail += f" at {at:%H:%M:%S} UTC"
        # hibernation begins with the notice: there is no time to count
        if kind != "hibernate":
            deadline = answer.deadline(at.replace(tzinfo=UTC).timestamp())
    return Notice(kind, Ec2.name, deadline, detail)
