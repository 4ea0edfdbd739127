"""The identity of the work in hand."""

import asyncio
import threading

from toile.core.context import Context, bind, current, new_id


def test_nobody_outside_of_a_block() -> None:
    assert current() == Context()


def test_blocks_nest_and_end() -> None:
    with bind(request_id="r", project="p"):
        with bind(job="j"):
            assert current() == Context("r", "p", "j")
        assert current() == Context("r", "p", "")
    assert current() == Context()


async def test_tasks_do_not_see_one_another() -> None:
    seen: dict[str, str] = {}

    async def work(name: str) -> None:
        with bind(request_id=name):
            await asyncio.sleep(0.001)
            seen[name] = await asyncio.to_thread(lambda: current().request_id)

    await asyncio.gather(*(work(str(i)) for i in range(20)))
    assert seen == {str(i): str(i) for i in range(20)}
    assert current() == Context()


def test_a_plain_thread_starts_as_nobody() -> None:
    seen: list[Context] = []
    with bind(request_id="r"):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [Context()]


def test_ids_are_unique_and_sort_by_time() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(len(i) == 32 and i[12] == "7" and i[16] in "89ab" for i in ids)
    times = [i[:12] for i in ids]
    assert times == sorted(times)
