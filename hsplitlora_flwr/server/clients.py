"""The clients of a run as the server knows them: who they are, what they may use, and messages to them.

Clients come and go. Each is asked once to describe itself; those drawn for a round are asked again for what may have
changed. A client that fails is left out of the round and may be drawn for the next. Of clients that are gone, or not
drawn, only the name is kept.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.limits import capped_shares
from hsplitlora_flwr.messages import (
    DESCRIBE,
    FORGET,
    Description,
    Outcome,
    ReplyError,
    printable,
    reading,
    settings_records,
)
from hsplitlora_flwr.models.fingerprint import fingerprint
from hsplitlora_flwr.planning.budget import Budget
from hsplitlora_flwr.planning.round import Size
from hsplitlora_flwr.reporting.report import RunReport
from hsplitlora_flwr.transport.bottleneck import digest, widths
from hsplitlora_flwr.transport.messages import converse
from hsplitlora_flwr.transport.workers import DeadWorkers, reason_of

log = logging.getLogger(__name__)

FORGET_SECONDS = 30.0
"""Time that nodes have to remove what they kept of a run."""

Answer = Callable[[Message], Message | None]
"""The next message to a client, from its reply; None if that was its last."""
Read = Callable[[int, RecordDict], Outcome]
"""A node's outcome from the content of its last reply; raises :class:`ReplyError` where it is not what it should be."""


class ClientFailedError(RuntimeError):
    """Too few clients could do their part of a round; the text holds what they reported."""


class Clients:
    """The clients that take part now, by node.

    Parameters
    ----------
    config : Config
    report : RunReport
        Is told about clients that fail.

    Attributes
    ----------
    descriptions : dict[int, Description]
        In the order of their names, which is the same in every run, whatever the nodes' ids.
    seconds : dict[int, float]
        From the last message to each node until its last reply.
    timeout : float
        Seconds that they have for an exchange.
    on_failure : Callable[[str], None]
        Is told the name of a client that is left out.
    on_draw : Callable[[Collection[str]], None]
        Is told the names of those that are to take part in a round, as far as they are known, before any is asked.
    """

    def __init__(self, config: Config, report: RunReport) -> None:
        self.on_failure: Callable[[str], None] = lambda client: None
        self.on_draw: Callable[[Collection[str]], None] = lambda clients: None
        self.descriptions: dict[int, Description] = {}
        self.seconds: dict[int, float] = {}
        self.timeout: float = config.run.timeout
        self._config, self._report = config, report
        self._fresh: dict[int, Description] = {}
        self._met: set[int] = set()
        self._owners: dict[str, int] = {}  # the node that a name belongs to
        self._names: dict[int, str] = {}  # the other way round
        self._capped: set[int] = set()
        self._dead = DeadWorkers()

    def name(self, node: int) -> str:
        """The name of a node's client in logs and results."""
        known = self.descriptions.get(node)
        return known.name if known else str(node)

    @property
    def budgets(self) -> dict[str, Budget]:
        """What each may use, by name."""
        return {description.name: description.budget for description in self.descriptions.values()}

    @property
    def sizes(self) -> dict[str, Size]:
        """Of what each sends, by name."""
        return {each.name: Size(each.longest, each.cut_width) for each in self.descriptions.values()}

    def shares(self, nodes: Iterable[int]) -> list[float]:
        """The weights ``p_i`` of these nodes by their numbers of examples, none above ``clients.max_share``."""
        nodes, cap = list(nodes), self._config.clients.max_share
        examples = [self.descriptions[node].examples for node in nodes]
        shares = capped_shares(examples, cap)
        for node, count in zip(nodes, examples, strict=True):
            share = count / sum(examples)
            if len(nodes) > 1 and share > cap and node not in self._capped:
                self._capped.add(node)
                self._report.status(
                    f"client {self.name(node)} says that it has {count:,} examples, {share:.1%} of all; it counts as "
                    f"{max(cap, 1 / len(nodes)):.1%} (clients.max_share)"
                )
        return shares

    def wait(self, grid: Grid, least: int = 0) -> None:
        """Wait until so many nodes are there; ``clients.count`` by default.

        Raises
        ------
        ClientFailedError
            If they are not within ``clients.wait`` seconds.
        """
        wanted, patience = least or self._config.clients.count, self._config.clients.wait
        self._report.phase(f"waiting for {wanted} clients")
        deadline = time.monotonic() + patience
        while len(nodes := list(grid.get_node_ids())) < wanted:
            if time.monotonic() > deadline:
                if least:
                    raise ClientFailedError(
                        f"{len(nodes)} clients are there after {patience} s, and clients.min={least}"
                    )
                raise ClientFailedError(
                    f"only {len(nodes)} of clients.count={wanted} clients came within {patience} s; in a simulation "
                    f"pass --federation-config 'num-supernodes={wanted}', or lower clients.count"
                )
            time.sleep(0.2)

    def describe(self, grid: Grid, server_round: int) -> None:
        """Draw the clients of a round, and ask for what each may use, but for those that said so with their last reply
        (:meth:`remember`). Before training, in round 0, all of them are asked, and the first round need not ask again.
        """
        nodes = sorted(grid.get_node_ids())
        self._keep_to(set(nodes))
        self.descriptions = {node: self._fresh[node] for node in nodes if node in self._fresh}
        drawn = nodes
        if server_round and self._draws:
            self._ask(grid, [node for node in nodes if node not in self._names], server_round, needed=0)
            drawn = self._draw(server_round)
            self.descriptions = {node: self.descriptions[node] for node in drawn if node in self.descriptions}
        self.on_draw({self._names[node] for node in drawn if node in self._names})
        needed = max(self._config.clients.min - len(self.descriptions), 0)
        self._ask(grid, [node for node in drawn if node not in self.descriptions], server_round, needed)
        self._fresh = {} if server_round else dict(self.descriptions)
        self.seconds = {node: seconds for node, seconds in self.seconds.items() if node in self.descriptions}
        self.descriptions = dict(sorted(self.descriptions.items(), key=lambda item: item[1].name))

    def _keep_to(self, nodes: Collection[int]) -> None:
        """Forget clients that are gone: one that comes back is another node."""
        self._names = {node: name for node, name in self._names.items() if node in nodes}
        self._owners = {name: node for node, name in self._names.items()}
        self._met &= set(nodes)
        self._capped &= set(nodes)

    @property
    def known(self) -> int:
        """How many clients there are, drawn or not."""
        return max(self._config.clients.count, len(self._owners))

    @property
    def _draws(self) -> bool:
        """Whether a round has only some of the clients."""
        return self._config.clients.per_round > 0 or self._config.clients.fraction < 1

    def _draw(self, server_round: int) -> list[int]:
        """The nodes of a round, drawn by seed, round and names, so that every run draws the same."""
        names = sorted(self._owners)
        dice = random.Random(f"{self._config.run.seed}/{server_round}")
        return [self._owners[name] for name in dice.sample(names, self._config.clients.drawn_of(len(names)))]

    def _ask(self, grid: Grid, nodes: Sequence[int], server_round: int, needed: int) -> None:
        """Ask nodes to describe themselves; those whose description is wrong are left out."""
        self._met |= set(nodes)
        base = fingerprint(self._config.model.path) if nodes else None
        messages = [Message(settings_records(self._config, base), node, DESCRIBE) for node in nodes]
        for reply in self.exchange(grid, messages, server_round, needed=needed):
            node = reply.metadata.src_node_id
            try:
                with reading("its description of itself"):
                    self.take_description(node, Description.from_records(reply.content))
            except ReplyError as flaw:
                self.leave_out(node, str(flaw), server_round)

    def take_description(self, node: int, description: Description) -> None:
        """Note what a node says of itself.

        A name belongs to the node that came with it, for as long as that node is there: whoever takes another one's
        would be taken for it in plans and in the log.

        Raises
        ------
        ReplyError
            If the name is another node's or another than before, an example is longer than it can be, or activations
            come in other directions than those of ``split.bottleneck``.
        """
        name, longest, most = description.name, description.longest, self._config.data.max_length
        if self._owners.get(name, node) != node:
            raise ReplyError(f"another node calls itself client {name}; give each a name or a partition-id")
        if (before := self._names.get(node, name)) != name:
            raise ReplyError(f"it calls itself {name}, and before it was client {before}; a node keeps its name")
        if longest > most:
            raise ReplyError(f"its longest example has {longest:,} tokens, and data.max_length={most} cuts them before")
        self._check_directions(description)
        self._owners[name], self._names[node] = node, name
        self.descriptions[node] = description

    def _check_directions(self, description: Description) -> None:
        """Check that the server has the directions of the bottleneck by which a client sends its activations."""
        if not (width := description.cut_width):
            return
        file = self._config.split.bottleneck
        if not file or description.cut_directions != digest(file):
            raise ReplyError(
                f"it sends its activations in {width} directions of a file with the digest "
                f"'{description.cut_directions}', and the run has "
                + (f"{file} with '{digest(file)}'" if file else "none")
                + "; name the same file in split.bottleneck as in its cut-bottleneck"
            )
        if width > (most := max(widths(file).values())):
            raise ReplyError(f"it sends its activations in {width} directions, and split.bottleneck={file} has {most}")

    def remember(self, node: int) -> None:
        """The description in a client's last reply holds for the next round too, so that it need not be asked again."""
        self._fresh[node] = self.descriptions[node]

    def now_holds(self, node: int, states: dict[str, str]) -> None:
        """Note the update that a client will hold once it has the message that is being sent."""
        known = self.descriptions[node]
        self.descriptions[node] = replace(known, held={**known.held, **states})

    def exchange(
        self,
        grid: Grid,
        messages: Iterable[Message],
        server_round: int,
        answer: Answer = lambda reply: None,
        needed: int | None = None,
        may_answer: Callable[[Message], bool] = lambda reply: True,
        deadline: float = 0.0,
    ) -> list[Message]:
        """Send messages and answer the replies, until every client sent its last; those that fail are left out.

        Parameters
        ----------
        messages : Iterable[Message]
            One for each node.
        answer : Answer
            See there.
        needed : int, optional
            Last replies that there must be; ``clients.min`` by default.
        may_answer : Callable[[Message], bool], optional
            Whether a reply can be answered now.
        deadline : float
            Seconds that they have to work; they have half as many again to say what they did. 0 = ``timeout`` alone.

        Returns
        -------
        list of Message
            The last replies, in the order of the clients' names.

        Raises
        ------
        ClientFailedError
            If there are fewer, with every failure's cause.
        """
        messages = list(messages)
        silent = {message.metadata.dst_node_id for message in messages}
        replies, failures, started = [], [], time.monotonic()
        seconds, setting = min((self.timeout, "run.timeout"), (_LATEST * deadline or math.inf, "clients.deadline"))
        for node, reply in converse(grid, messages, answer, seconds, self._dead, may_answer):
            silent.discard(node)
            if reply.has_error():
                failures.append(self.leave_out(node, reason_of(reply), server_round))
            else:
                self.seconds[node] = time.monotonic() - started
                replies.append(reply)
        for node in silent:
            reason = f"no reply within {seconds:.4g} s ({setting})"
            failures.append(self.leave_out(node, reason, server_round))
        self._require(needed, len(replies), failures)
        return sorted(replies, key=lambda reply: self.name(reply.metadata.src_node_id))

    def outcomes(
        self, replies: Iterable[Message], server_round: int, read: Read, needed: int | None = None
    ) -> Iterator[tuple[int, Outcome]]:
        """What the clients did, by node; one whose reply cannot be used is left out.

        Parameters
        ----------
        replies : Iterable[Message]
            What :meth:`exchange` returned.
        read : Read
            See there.
        needed : int, optional
            Outcomes that there must be; ``clients.min`` by default.

        Raises
        ------
        ClientFailedError
            After the last, if there were fewer, with every flaw.
        """
        good, flaws = 0, []
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                with reading("its reply"):
                    outcome = read(node, reply.content)
                    self.take_description(node, outcome.description)
            except ReplyError as flaw:
                flaws.append(self.leave_out(node, str(flaw), server_round))
            else:
                good += 1
                yield node, outcome
        self._require(needed, good, flaws)

    def refuse(self, flaws: Mapping[int, str], left: int, server_round: int) -> None:
        """Leave out clients whose outcome cannot be used beside the others'.

        Parameters
        ----------
        flaws : Mapping[int, str]
            Why, by node.
        left : int
            Outcomes without theirs; :class:`ClientFailedError` if they are too few.
        """
        self._require(None, left, [self.leave_out(node, flaw, server_round) for node, flaw in flaws.items()])

    def _require(self, needed: int | None, count: int, failures: Sequence[str]) -> None:
        needed = self._config.clients.min if needed is None else needed
        if count < needed:
            few = f"{count} clients are left, and clients.min={needed}" if count else "no client is left"
            raise ClientFailedError(f"{few}: {_in_few_words(failures)}" if failures else few)

    def leave_out(self, node: int, reason: str, server_round: int) -> str:
        """Leave a client out of this round; returns what happened to it."""
        client, reason = self.name(node), printable(reason)
        self.on_failure(client)
        self.descriptions.pop(node, None)
        self._fresh.pop(node, None)
        self._report.client_failed(server_round, client, reason)
        return f"client {client} failed: {reason}"

    def forget(self, grid: Grid) -> None:
        """Tell the nodes that the run is over, once: they remove what they kept of it.

        A run ends as it ended, whether they answer or not, so nothing is raised.
        """
        met, self._met = self._met, set()
        try:
            messages = [Message(RecordDict(), node, FORGET) for node in grid.get_node_ids() if node in met]
            told = converse(grid, messages, lambda reply: None, min(self.timeout, FORGET_SECONDS), self._dead)
            silent = met - {node for node, reply in told if not reply.has_error()}
        except Exception:  # whatever the connection says
            log.warning("nodes could not be told to remove what they keep of the run", exc_info=True)
        else:
            if silent:
                names = ", ".join(sorted(self.name(node) for node in silent))
                log.warning("not removed yet, since no answer came: what clients keep of the run (%s)", names)


def _in_few_words(failures: Iterable[str]) -> str:
    """What happened to clients, with a reason that several share said once."""
    clients = defaultdict[str, list[str]](list)
    for failure in failures:
        client, _, reason = failure.removeprefix("client ").partition(" failed: ")
        clients[reason].append(client)
    told = [
        f"client{'s' * (len(names) > 1)} {', '.join(sorted(names))} failed: {reason}"
        for reason, names in list(clients.items())[:_REASONS]
    ]
    more = len(clients) - len(told)
    return "; ".join(told) + (f"; and {more} other reasons, which the log has" if more else "")


_REASONS = 3
_LATEST = 1.5
