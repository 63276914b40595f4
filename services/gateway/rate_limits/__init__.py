"""Rate limits that several gateways keep together: each leases permits from a shared counter and spends them locally.

A policy admits ``limit`` requests of a subject in each window. Windows are fixed and aligned to the epoch. For each
policy and subject MongoDB holds one counter: which window it is, and how many of its permits are ``taken``. One atomic
update (``counters.py``) reads MongoDB's clock, starts the next window if it has begun, and grants a lease: a sixteenth
of what is left, at least one permit. The gateway spends its lease without asking anybody (``permits.py``), until

- no permit is left, or a second has passed: the next request returns what was not spent and gets a new lease;
- the second has passed and no request came: what was not spent is given back in the background (``limiter.py``);
- the window may have ended by MongoDB's clock: a permit is never spent in another window than its own.

``taken`` is raised before a permit is spent, and lowered only for permits that their gateway has dropped. So no more
than ``limit`` requests are admitted in a window, whatever is lost, late or killed. Permits that were lost, with a reply
or a killed gateway, stay taken until the window ends: a lease at most.

A worked example, 100 requests a minute, two gateways:

======== ====================================================== ===== ==== ==== =========
time     what happens                                           taken A    B    Remaining
======== ====================================================== ===== ==== ==== =========
12:00:05 A's first request: 100 // 16 = 6 permits, one is spent     6    5    -        99
12:00:05 B's first request: 94 // 16 = 5 permits, one is spent     11    5    4        93
12:00:05 A spends another three permits                            11    2    4        96
12:00:06 A's lease ended: it returns 2, gets 91 // 16 = 5,
         and spends one                                            14    4    4        90
12:00:07 B had no more requests and gives back its 4               10    4    0
12:00:07 A's next request renews: 94 // 16 = 5, one is spent       11    4    0        93
12:00:07 A is killed: its 4 stay taken until 12:01:00              11    -    0
12:00:08 B's next request: 89 // 16 = 5 permits, one is spent      16    -    4        88
12:01:00 the next lease starts a window with nothing taken          6
======== ====================================================== ===== ==== ==== =========

``Remaining`` is what is free as far as this gateway knows: its own permits, and those that were left in the counter
when its lease started, at most a second ago. So it may rise when another gateway answers (93 to 96 above), or gives
permits back (90 to 93).

While MongoDB can't be reached, each gateway admits its part of the limit by itself (``X-RateLimit-Mode: local``) and
adds these requests to ``taken`` with its next lease.
"""
