"""A bank of scales is what each scale on its own would be: values, rounding and gradients."""

from __future__ import annotations

import numpy as np
import torch

from ernieq.convert.scale_bank import ScaleBank

CPU = torch.device("cpu")


def some_scales() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {
        name: random.uniform(0.01, 2, rows).astype(np.float16) for name, rows in (("a", 3), ("b", 5), ("c", 4))
    }


def test_at_first_products_see_the_stored_scales_in_blocks() -> None:
    stored = some_scales()
    bank = ScaleBank(stored, [["b"], ["a", "c"]], CPU)
    assert (bank.leaf(["a", "c"]).detach().numpy() == np.concatenate([stored["a"], stored["c"]])).all()
    assert all((bank.rounded(name) == stored[name]).all() for name in stored)


def test_leaves_follow_the_changes_and_gather_their_gradients() -> None:
    stored = some_scales()
    bank = ScaleBank(stored, [["b"], ["a", "c"]], CPU)
    single, block = bank.leaf(["b"]), bank.leaf(["a", "c"])
    bank.change.data += torch.linspace(-0.1, 0.1, 12)
    bank.refresh()
    plain = {name: torch.from_numpy(scale.astype(np.float32)) for name, scale in stored.items()}
    changes = dict(zip("bac", torch.linspace(-0.1, 0.1, 12).split([5, 3, 4]), strict=True))
    exact = {name: plain[name] * changes[name].exp() for name in plain}
    assert torch.equal(single.detach(), exact["b"].half().float())
    assert torch.equal(block.detach(), torch.cat([exact["a"], exact["c"]]).half().float())
    for _ in range(2):  # gradients of several backward passes add up
        (single.square().sum() + 3 * block.sum()).backward()
    bank.collect()
    wanted = torch.cat([4 * single.detach() * exact["b"], 6 * exact["a"], 6 * exact["c"]])
    assert bank.change.grad is not None
    torch.testing.assert_close(bank.change.grad, wanted)
    bank.collect()
    assert not bank.change.grad.any()  # begun anew


def test_a_huge_change_stays_within_float16() -> None:
    bank = ScaleBank(some_scales(), [["a", "b", "c"]], CPU)
    bank.change.data += 50
    bank.refresh()
    assert np.isfinite(bank.rounded("a")).all()
    bank.change.data -= 100
    bank.refresh()
    assert (bank.rounded("a") > 0).all()
