"""The rules that a simulation holds the protocol to."""

from __future__ import annotations

__all__ = ["INJECTED", "RULES", "Violation"]

RULES = {
    "doubled": "a write is applied once",
    "lost": "an acknowledged write was applied, as its revision says",
    "refused": "what ends in an error that says 'not applied' is never applied",
    "late": "what a store has given up is not applied after a write that it began later",
    "condition": "a write meets the revision, maker and lease that it names, and is above its high-water mark",
    "answer": "a refusal has its reason",
    "revisions": "a partition's revisions are 1, 2, 3, ...",
    "state": "what is stored is what the log makes, in every key",
    "part": "a write changes what its caller changes, and nothing that others have changed meanwhile",
    "turns": "no turn is lost or doubled, whoever adds and removes them",
    "popped": "a turn is popped once: who gets it has removed it",
    "placed": "a record that is new is put once, a session made once, and who did it is told so, whatever is lost",
    "conflict": "there is a conflict only where two have changed one part, and it names what collides",
    "resurrected": "a session that was deleted does not come back by a write to the old one",
    "merged": "after a save or refresh an asset is what is stored, with its worker's changes since",
    "index": "the index has the session's labels and its project's name and path",
    "records": "the names of records are those of the records",
    "listed": "lists and counts have the sessions that were there, as they were",
    "loaded": "a load returns a session as some write made it",
    "windows": "dedup windows are bounded in number and bytes, and their bytes are counted",
    "message": "each write is published once, in order, as it was",
    "identity": "no two writes have one operation id",
    "token": "fencing tokens only grow",
    "lease": "a lease has one holder, a time to live, and is not given to who is done with it",
    "held": "a holder learns in time that it lost a lease, and keeps what it was just given",
    "watch": "changes come in order, once, as they were; the last state of each session comes",
    "reset": "a watch ends in StoreResetError with a cause, and always if the data is behind it",
    "rest": "nothing goes on without end, or fast, when nothing happens any more",
    "crash": "no error but our own, no error of a script",
}

INJECTED = ("LOADING", "READONLY", "BUSY", "NOREPLICAS", "NOSCRIPT")  # refusals that the network makes up


class Violation(AssertionError):
    """A rule was broken."""

    def __init__(self, rule: str, text: str) -> None:
        assert rule in RULES, rule
        super().__init__(f"{rule}: {text}")
        self.rule = rule
