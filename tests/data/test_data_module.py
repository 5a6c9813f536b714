import contextlib
import itertools

import lightning
import pytest
import torch

from gla_ablate.data import check_data
from gla_ablate.data.module import DataModule


@pytest.fixture
def config(write):
    text = bytes(range(1, 256)) * 20
    return check_data(
        {"name": "text", "files": [write("a.txt", text)], "seq_len": 16, "batch_size": 4, "val_tokens": 200}
    )


def batches(module: DataModule, count: int) -> torch.Tensor:
    with contextlib.closing(module):
        return torch.stack([batch["inputs"] for batch in itertools.islice(module.train_dataloader(), count)])


def test_batches_depend_on_the_seed(config):
    assert torch.equal(batches(DataModule(config, seed=0), 5), batches(DataModule(config, seed=0), 5))
    assert not torch.equal(batches(DataModule(config, seed=0), 5), batches(DataModule(config, seed=1), 5))


def test_a_later_start_goes_on_exactly_across_epochs(config):
    whole = batches(DataModule(config, seed=0), 150)  # 71 batches an epoch
    for start in (1, 70, 71, 100):
        assert torch.equal(batches(DataModule(config, seed=0, start_step=start), 150 - start), whole[start:])


def test_no_sample_comes_twice_in_an_epoch(config):
    module = DataModule(config, seed=0)
    steps = len(module.source.train) // 4
    drawn = module.train_dataloader().batches
    rows = [row for batch in itertools.islice(drawn, steps) for row in batch]
    assert len(set(rows)) == len(rows) == steps * 4


def test_validation_is_the_same_for_every_seed_and_reads_every_row_once(config):
    loaders = [DataModule(config, seed=seed).val_dataloader() for seed in (0, 7)]
    first, second = ([batch["inputs"] for batch in loader] for loader in loaders)
    assert [len(batch) for batch in first] == [4, 4, 4]
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert len(torch.unique(torch.cat(first), dim=0)) == 12


def test_targets_are_the_inputs_one_step_later(config):
    module = DataModule(config, seed=0)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        batch = next(iter(loader))
        assert torch.equal(batch["targets"][:, :-1], batch["inputs"][:, 1:])


class Recorder(lightning.LightningModule):
    """A model of one weight that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown, self.validated = [], []

    def training_step(self, batch, index):
        self.shown.append(batch["inputs"])
        return self.weight * 1.0

    def validation_step(self, batch, index):
        self.validated.append(batch["inputs"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(config, folder, max_steps, ckpt_path=None):
    trainer = lightning.Trainer(
        max_steps=max_steps,
        val_check_interval=50,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Recorder()
    trainer.fit(model, datamodule=DataModule(config, seed=3), ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model


def test_a_trainer_resumes_from_a_checkpoint_with_the_batches_that_come_next(config, tmp_path):
    whole = fit(config, tmp_path, 100)
    fit(config, tmp_path, 73)  # and more is read ahead
    resumed = fit(config, tmp_path, 100, ckpt_path=tmp_path / "last.ckpt")
    expected = batches(DataModule(config, seed=3), 100)
    assert torch.equal(torch.stack(whole.shown), expected)
    assert torch.equal(torch.stack(resumed.shown), expected[73:])
    assert len(whole.validated) == 2 * 3
