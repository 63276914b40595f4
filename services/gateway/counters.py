"""The shared counters: one document a policy and subject, changed by one ``findOneAndUpdate`` an ask.

The store's own clock (``$$NOW``) says inside the update which window it is, and begins the next one there, so no ask
can be charged to a window that is over. The counter lends ``max(1, what is left // 16)`` permits at a time: few round
trips for a busy subject, and little that lies idle at a gateway while another one needs it.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from libs.mongodb.client import Collection, Document, DuplicateKeyError, IndexModel, ReturnDocument, UpdateOne
from services.gateway.permits import SLOT_MS, Ask, Policy, Told

LENT_PART = 16
KEPT_MS = int(timedelta(minutes=10).total_seconds() * 1000)
ATTEMPTS_MAX = 3

Expression = Any


class Counters:
    """The counters of an installation.

    Args:
        holder: this gateway's name in them, of letters and digits.
    """

    def __init__(self, collection: Collection, holder: str) -> None:
        self._collection = collection
        self._holder = holder

    async def open(self) -> None:
        """Let the store remove counters whose window is long over."""
        await self._collection.create_indexes([IndexModel("expires_at", expireAfterSeconds=0)])

    async def ask(self, policy: Policy, subject: str, ask: Ask) -> Told:
        """Ask for permits."""
        attempt = 1
        while True:
            try:
                document = await self._collection.find_one_and_update(
                    self._unheard(policy, subject, ask),
                    change_of(ask, policy, self._holder),
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
            except DuplicateKeyError:
                # Two gateways made the same counter at once; the second finds it now.
                if attempt == ATTEMPTS_MAX:
                    raise
                attempt += 1
            else:
                return told_of(document, self._holder)

    async def give_back(self, items: Sequence[tuple[Policy, str, Ask]]) -> None:
        """Return what is idle, many subjects' at once."""
        changes = [
            UpdateOne(self._unheard(policy, subject, ask), change_of(ask, policy, self._holder))
            for policy, subject, ask in items
        ]
        await self._collection.bulk_write(changes, ordered=False)

    def _unheard(self, policy: Policy, subject: str, ask: Ask) -> Document:
        return {
            "_id": f"{policy.name}/{policy.period_seconds}/{subject}",
            f"holders.{self._holder}.number": {"$not": {"$gte": ask.number}},
        }


def told_of(document: Document, holder: str) -> Told:
    """What a changed counter says to the holder who asked."""
    mine = document["holders"][holder]
    return Told(
        now_ms=document["now_ms"],
        window_ms=document["window_ms"],
        slot_ms=document["slot_ms"],
        is_sole=document["sole"] == holder,
        must_wait=mine["waits"],
        spent_by_all=document["spent"],
        spent=mine["spent"],
        held=mine["held"],
        low=document["low"],
        shown=document["shown"],
    )


def change_of(ask: Ask, policy: Policy, holder: str, now: Expression = "$$NOW") -> list[Document]:
    """The update pipeline of an ask.

    A counter holds ``taken`` (permits spent or held), ``spent``, and for ``Remaining``: ``low``, what was said in
    earlier slots; ``sole``, who has the slot for itself; ``floor``, the lowest that it may say there; ``shown``, the
    number of a shared slot; ``contested``, whether somebody had to wait for a sole slot in this window.
    """
    stages = [
        *_entered(policy, now),
        *_accounted(ask, policy, holder),
        *(_lent(ask, policy, holder) if ask.wants else [_kept(ask, holder)]),
    ]
    return [*stages, {"$unset": "x"}]


def _entered(policy: Policy, now: Expression) -> list[Document]:
    """Which window and slot it is; a new window begins with everything unspent. The clock does not go back."""
    fresh: Document = {
        "taken": 0,
        "spent": 0,
        "low": policy.limit,
        "floor": policy.limit,
        "shown": policy.limit,
        "slot_ms": 0,
        "sole": None,
        "contested": False,
        "holders": {},
    }
    is_new = {"$ne": ["$window_ms", "$x.window_ms"]}
    return [
        {"$set": {"now_ms": {"$max": [{"$toLong": now}, {"$ifNull": ["$slot_ms", 0]}]}}},
        {"$set": {"x.window_ms": _begin("$now_ms", policy.period_ms), "x.slot_ms": _begin("$now_ms", SLOT_MS)}},
        {
            "$set": {
                "window_ms": "$x.window_ms",
                "expires_at": {"$toDate": {"$add": ["$x.window_ms", policy.period_ms + KEPT_MS]}},
                **{name: _if(is_new, {"$literal": value}, f"${name}") for name, value in fresh.items()},
            }
        },
    ]


def _accounted(ask: Ask, policy: Policy, holder: str) -> list[Document]:
    """What the holder says it spent, keeps and told, in the place of what it said before."""
    is_about_now = {"$eq": ["$window_ms", ask.window_ms]}
    return [
        {
            "$set": {
                "x.was": {"$ifNull": [f"$holders.{holder}", {"spent": 0, "held": 0}]},
                "x.held": _if(is_about_now, ask.held, 0),
                "low": {"$min": ["$low", policy.limit, _if(is_about_now, ask.told, policy.limit)]},
                "floor": _if({"$eq": ["$sole", holder]}, policy.limit, "$floor"),
            }
        },
        {"$set": {"x.spent": {"$max": ["$x.was.spent", _if(is_about_now, ask.spent, 0)]}}},
        {
            "$set": {
                "spent": {"$add": ["$spent", _minus("$x.spent", "$x.was.spent")]},
                "taken": {"$add": [_minus(_minus("$taken", "$x.was.spent"), "$x.was.held"), "$x.spent", "$x.held"]},
            }
        },
    ]


def _kept(ask: Ask, holder: str) -> Document:
    return {"$set": {f"holders.{holder}": _held(ask, waits=False)}}


def _lent(ask: Ask, policy: Policy, holder: str) -> list[Document]:
    """Lend permits, or have the holder wait for the end of a slot that is another's."""
    is_first, waits, refused = "$x.is_first", "$x.waits", "$x.refused"
    is_anothers = {"$not": {"$in": ["$sole", [None, holder]]}}
    left = _minus(policy.limit, "$taken")
    lent = {"$max": [0, {"$min": [left, {"$max": [1, {"$floor": {"$divide": [left, LENT_PART]}}]}]}]}
    said = {"$max": [0, {"$min": ["$low", _minus(policy.limit, {"$add": ["$spent", 1]})]}]}
    alone = _if({"$and": [ask.alone, {"$not": "$contested"}]}, holder, None)
    lowest = {"$max": [0, {"$min": ["$low", _minus(_minus(policy.limit, "$spent"), "$x.held")]}]}
    return [
        {"$set": {"x.is_first": {"$lt": ["$slot_ms", "$x.slot_ms"]}}},
        {"$set": {"x.waits": {"$and": [{"$not": is_first}, is_anothers]}}},
        {
            "$set": {
                "low": _if({"$and": [is_first, is_anothers]}, {"$min": ["$low", "$floor"]}, "$low"),
                "sole": _if(is_first, alone, "$sole"),
                "slot_ms": {"$max": ["$slot_ms", "$x.slot_ms"]},
                "contested": {"$or": ["$contested", waits]},
                "x.lent": {"$toInt": _if({"$or": [waits, {"$gt": ["$x.held", 0]}]}, 0, lent)},
            }
        },
        {"$set": {"x.held": {"$add": ["$x.held", "$x.lent"]}, "taken": {"$add": ["$taken", "$x.lent"]}}},
        {"$set": {"x.refused": {"$and": [{"$not": waits}, {"$eq": ["$x.held", 0]}]}}},
        {"$set": {"shown": _if(is_first, _if(refused, 0, said), "$shown")}},
        {
            "$set": {
                "low": _if(refused, 0, _if({"$eq": ["$sole", None]}, {"$min": ["$low", "$shown"]}, "$low")),
                f"holders.{holder}": _held(ask, waits=waits),
            }
        },
        {"$set": {"floor": _if({"$eq": ["$sole", holder]}, lowest, "$floor")}},
    ]


def _held(ask: Ask, *, waits: Expression) -> Document:
    return {"number": ask.number, "spent": "$x.spent", "held": "$x.held", "waits": waits}


def _begin(moment: Expression, length_ms: int) -> Document:
    return _minus(moment, {"$mod": [moment, length_ms]})


def _minus(left: Expression, right: Expression) -> Document:
    return {"$subtract": [left, right]}


def _if(condition: Expression, then: Expression, otherwise: Expression) -> Document:
    return {"$cond": [condition, then, otherwise]}
