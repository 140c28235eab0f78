"""What we rely on in verl 0.9.1 and TransferQueue: an upgrade that changes it fails here, not in a run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from verl_ext.batch_plan import is_padding_row
from verl_ext.compaction import PADDING_ROW_TOKENS
from verl_ext.compat import actor_class
from verl_ext.packing import lengths, response_positions, to_jagged

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]


def resolve(path: str) -> Any:
    """``module:attribute.attribute``; the plain class behind a Ray actor class."""
    module, _, attributes = path.partition(":")
    found = import_module(module)
    for name in attributes.split(".") if attributes else ():
        found = getattr(found, name)
        if hasattr(found, "__ray_actor_class__"):
            found = actor_class(found)
    return found


def test_the_version_is_the_one_everything_below_was_recorded_from() -> None:
    assert version("verl") == "0.9.1"


# Callable -> parameters that our code passes, by name or by position.
PARAMETERS = {
    "verl.utils.tensordict_utils:assign_non_tensor": ["tensor_dict", "kwargs"],
    "verl.utils.tensordict_utils:get": ["tensordict", "key"],
    "verl.utils.tensordict_utils:pop": ["tensordict", "key", "default"],
    "verl.utils.tensordict_utils:get_tensordict": ["tensor_dict", "non_tensor_dict"],
    "verl.utils.tensordict_utils:index_select_tensor_dict": ["batch", "indices"],
    "verl.utils.tensordict_utils:list_of_dict_to_tensordict": [],
    "verl.utils.debug:marked_timer": ["name", "timing_raw", "color"],
    "verl.utils.metric:reduce_metrics": ["metrics"],
    "verl.utils.metric:Metric.__init__": ["value", "aggregation"],
    "verl.utils.metric:Metric.aggregate_dp": [],
    "verl.utils.py_functional:rename_dict": ["data", "prefix"],
    "verl.utils.py_functional:append_to_dict": ["data", "new_data"],
    "verl.utils.import_utils:load_class_from_fqn": [],
    "verl.utils.ray_utils:auto_await": [],
    "verl.utils.device:get_device_name": [],
    "verl.utils.device:get_vendor": [],
    "verl.utils:hf_tokenizer": ["kwargs"],
    "verl.utils.reward_score:default_compute_score": ["data_source", "solution_str", "ground_truth", "extra_info"],
    "verl.utils.seqlen_balancing:get_seqlen_balanced_partitions": ["seqlen_list", "k_partitions", "equal_size"],
    "verl.workers.utils.padding:no_padding_2_padding": ["tensor", "data"],
    "verl.workers.utils.padding:response_to_nested": ["tensor", "response_mask"],
    "verl.workers.utils.losses:ppo_loss": ["config", "model_output", "data"],
    "verl.trainer.constants_ppo:get_ppo_ray_runtime_env": ["config"],
    "verl.trainer.ppo.reward:get_custom_reward_fn": ["config"],
    "verl.trainer.ppo.core_algos:register_adv_est": ["name_or_enum"],
    "verl.trainer.ppo.core_algos:agg_loss": [
        "loss_mat",
        "loss_mask",
        "loss_agg_mode",
        "dp_size",
        "batch_num_tokens",
        "global_batch_size",
        "loss_scale_factor",
    ],
    "verl.trainer.ppo.padding_utils:upsample_batch_to_divisible_size": ["batch", "batch_multiple", "eos_token_id"],
    "verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_and_add_to_batch": [
        "batch",
        "rollout_corr_config",
    ],
    "verl.trainer.ppo.v1.utils:compute_advantage_for_multi_trajectories": [
        "data",
        "batch_keys",
        "adv_estimator",
        "gamma",
        "lam",
        "num_repeat",
        "norm_adv_by_std_in_grpo",
        "config",
    ],
    "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.__init__": ["poll_interval"],
    "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.sample": ["global_steps", "partition_id", "batch_size"],
    "verl.protocol:DataProto.__init__": ["batch", "non_tensor_batch"],
    "verl.single_controller.base.decorator:register": ["dispatch_mode"],
    "verl.single_controller.base.decorator:make_nd_compute_dataproto_dispatch_fn": ["mesh_name"],
    "verl.workers.engine_workers:TrainingWorker.__init__": ["config"],
    "verl.workers.engine_workers:TrainingWorker.infer_batch": ["data"],
    "verl.workers.engine_workers:TrainingWorker.train_batch": ["data"],
    "verl.workers.engine_workers:TrainingWorker.train_mini_batch": ["data"],
    "verl.workers.engine_workers:TrainingWorker.set_loss_fn": ["loss_fn"],
    "verl.workers.engine_workers:ActorRolloutRefWorker.init_model": [],
    "verl.workers.engine_workers:ActorRolloutRefWorker.compute_log_prob": ["data"],
    "verl.workers.engine.base:EngineRegistry.register": ["model_type", "backend", "device", "vendor"],
    "verl.workers.engine.base:EngineRegistry.get_engine_cls": ["model_type", "backend"],
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead._build_fsdp_module": ["module"],
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.to": ["device", "model", "optimizer", "grad"],
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.lr_scheduler_step": [],
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.is_mp_src_rank_with_outputs": [],
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.get_data_parallel_group": [],
    "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.train_mode": [],
    "verl.workers.rollout.llm_server:LLMServerManager.create": [],
    "verl.workers.rollout.llm_server:LLMServerManager.get_client": [],
    "verl.workers.rollout.llm_server:LLMServerManager.get_replicas": [],
    "verl.workers.rollout.llm_server:LLMServerClient.__init__": ["config", "load_balancer_handle"],
    "verl.workers.rollout.llm_server:LLMServerClient.generate": ["request_id", "prompt_ids", "sampling_params"],
    "verl.workers.rollout.llm_server:LLMServerClient._acquire_server": ["request_id", "extra"],
    "verl.workers.rollout.llm_server:LLMServerClient._release_server": ["server_id", "request_id"],
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ.create": [],
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ._init_agent_loop_workers": [],
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._run_prompt": [
        "prompt",
        "sampling_params",
        "trajectory",
        "trace",
    ],
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._run_agent_loop": [
        "sampling_params",
        "trajectory",
        "agent_name",
        "kwargs",
    ],
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._agent_loop_postprocess": ["output", "validate", "kwargs"],
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._compute_position_ids": [
        "input_ids",
        "attention_mask",
        "multi_modal_inputs",
    ],
    "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.generate_sequences": ["batch"],
    "verl.experimental.agent_loop.agent_loop:AgentLoopBase.ct_build_initial_tokens": ["messages"],
    "verl.utils.dataset.rl_dataset:collate_fn": ["data_list"],
    "verl.single_controller.ray.base:RayClassWithInitArgs.__init__": ["cls", "kwargs"],
    "verl.single_controller.ray.base:RayWorkerGroup.__init__": ["resource_pool", "ray_cls_with_init", "kwargs"],
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup": [],
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._fetch_one_gen_batch": [],
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._validate": [],
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.on_step_begin": [],
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.on_train_begin": [],
    "verl.experimental.reward_loop.reward_loop:RewardLoopWorker.compute_score_batch": ["data"],
    "verl.plugin.platform.platform_manager:PlatformRegistry.register": ["platform"],
    "verl.plugin.platform.platform_manager:PlatformRegistry.get": [],
    "transfer_queue:init": ["conf"],
    "transfer_queue:close": [],
    "transfer_queue:kv_batch_put": ["keys", "partition_id", "fields", "tags"],
    "transfer_queue:async_kv_batch_put": ["keys", "partition_id", "fields", "tags"],
    "transfer_queue:kv_batch_get": ["keys", "partition_id", "select_fields"],
}


@pytest.mark.parametrize("path", sorted(PARAMETERS))
def test_a_callable_we_use_has_the_parameters_we_pass(path: str) -> None:
    found = inspect.signature(resolve(path)).parameters
    assert set(PARAMETERS[path]) <= set(found), f"{path} has {list(found)}"


def imported_names() -> set[tuple[str, str]]:
    """Every ``from verl… import name`` (and TransferQueue, vLLM) of our code."""
    names = set()
    for folder in ("verl_ext", "recipe", "data_prep"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    if node.module.split(".")[0] in ("verl", "transfer_queue", "vllm"):
                        names |= {(node.module, alias.name) for alias in node.names}
    return names


def test_every_symbol_that_our_code_imports_exists() -> None:
    missing = []
    for module, name in sorted(imported_names()):
        if not hasattr(import_module(module), name):
            try:
                import_module(f"{module}.{name}")
            except ImportError:
                missing.append(f"{module}.{name}")
    assert not missing
    assert len(imported_names()) > 30


def test_verl_ext_imports_nothing_of_recipe() -> None:
    for file in (ROOT / "verl_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [m for m in modules if m.split(".")[0] in ("recipe", "data_prep", "tests")], file


# ------------------------------------------------------------------------------------------------------- the trainer

STEP_ONCE = [
    "self.on_sample_begin",
    "self.replay_buffer.sample",
    "self.on_sample_end",
    "self._compute_reward_colocate",
    "self._balance_batch",
    "self._compute_old_log_prob",
    "self._compute_ref_log_prob",
    "self._compute_values",
    "self._compute_advantage",
    "self._update_critic",
    "self._update_actor",
]
FIT = [
    "self.on_validate_begin",
    "self._validate",
    "self.on_validate_end",
    "self.logger.log",
    "self._shutdown_dump_executor",
    "self._reissue_inflight_prompts",
    "self.on_train_begin",
    "self.on_step_begin",
    "self._start_profiling",
    "self.step",
    "self._stop_profiling",
    "self._save_checkpoint",
    "self.on_step_end",
    "self._consume_sync_metrics",
    "self.on_validate_begin",
    "self._validate",
    "self.on_validate_end",
    "self._compute_metrics",
    "self._log_rollout_data",
    "tq.kv_clear",
    "self.logger.log",
    "self.dapo_filtered_reward_logger.log",
    "self._shutdown_dump_executor",
    "self.on_train_end",
    "self._shutdown_dump_executor",
]


def calls(function: Callable[..., Any], prefixes: tuple[str, ...] = ("self.", "tq.")) -> list[str]:
    """The calls on ``self`` (and the like) that a function makes, in the order of its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [
        (node.lineno, node.col_offset, ast.unparse(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)
    ]
    return [name for _, _, name in sorted(found) if name.startswith(prefixes) and ".config." not in name]


def trainer_class() -> type:
    return resolve("verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync")


def test_a_step_of_the_base_trainer_makes_the_recorded_calls_in_the_recorded_order() -> None:
    assert calls(trainer_class()._step_once) == STEP_ONCE


def test_fit_saves_before_the_weight_sync_and_logs_before_the_next_step() -> None:
    assert calls(trainer_class().fit) == FIT


def test_the_tracker_file_is_written_last_of_a_checkpoint() -> None:
    source = inspect.getsource(trainer_class()._save_checkpoint)
    order = [source.index(text) for text in ("save_checkpoint(", "torch.save(", "latest_checkpointed_iteration.txt")]
    assert order == sorted(order)


def test_everything_our_trainer_overrides_or_calls_exists_in_the_base_with_the_same_parameters() -> None:
    from verl_ext.question_trainer import QuestionTrainer
    from verl_ext.trainer import DistillTrainer

    base = trainer_class()
    overridden = {
        "_init_dataloader",
        "_build_replay_buffer",
        "_init_resource_pool_mgr",
        "on_init_end",
        "_step_once",
        "_compute_old_log_prob",
        "_compute_advantage",
        "_update_actor",
        "on_step_end",
        "on_validate_begin",
        "on_validate_end",
        "_val_metrics_update",
        "_save_checkpoint",
        "_load_checkpoint",
        "_setup",
        "on_step_begin",
        "_fetch_one_gen_batch",
        "_validate",
    }
    for name in overridden:
        mine, theirs = inspect.signature(getattr(DistillTrainer, name)), inspect.signature(getattr(base, name))
        assert list(mine.parameters) == list(theirs.parameters), name
    ours = vars(QuestionTrainer) | vars(DistillTrainer)
    shared = {name for name, value in ours.items() if callable(value) and hasattr(base, name)}
    assert shared - {"__init__", "__doc__", "__module__"} == overridden, "a method of ours hides one of verl's"
    for name in (
        "_compute_ref_log_prob",
        "on_sample_begin",
        "on_sample_end",
        "get_llm_client",
        "get_teacher_client",
        "get_reward_handles",
        "init",
        "fit",
    ):
        assert callable(getattr(base, name)), name


def test_a_validation_goes_once_through_its_loader_and_expects_answers_in_that_order() -> None:
    """Ours learns from the loader which question each uid of ``expected_acc_counts`` is."""
    validate = ast.parse(textwrap.dedent(inspect.getsource(trainer_class()._validate)))
    loops = [node for node in ast.walk(validate) if isinstance(node, ast.For)]
    assert [ast.unparse(node.iter) for node in loops].count("self.val_dataloader") == 1
    uses = [node for node in ast.walk(validate) if isinstance(node, ast.Attribute) and node.attr == "val_dataloader"]
    assert len(uses) == 1
    source = ast.unparse(validate)
    order = ["expected_acc_counts: dict[tuple[str, str], int] = {}", "in self.val_dataloader:", "'raw_prompt'",
             "for uid, data_source, rollout_n in zip(batch_dict['uid']",
             "expected_acc_counts[str(data_source), str(uid)] = rollout_n",
             "expected_acc_counts=expected_acc_counts"]  # fmt: skip
    places = [source.index(text) for text in order]
    assert places == sorted(places)


def test_the_trainer_keeps_what_fit_assigns_to_logger() -> None:
    """Our property takes the tracker there; ``fit`` has to go on assigning it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(trainer_class().fit)))
    assigned = {ast.unparse(t) for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets}
    assert "self.logger" in assigned


def test_the_resource_pool_method_fills_the_two_mappings_we_edit() -> None:
    source = inspect.getsource(trainer_class()._init_resource_pool_mgr)
    assert "self.role_worker_mapping" in source and "self.mapping" in source
    setup = inspect.getsource(trainer_class()._setup)
    assert "Role.ActorRolloutRef" in setup and "self.actor_rollout_wg" in setup
    from verl.trainer.ppo.utils import Role

    assert {"ActorRollout", "ActorRolloutRef"} <= set(Role.__members__)


def test_the_inner_worker_classes_are_attributes_that_a_subclass_may_set() -> None:
    worker = resolve("verl.workers.engine_workers:ActorRolloutRefWorker")
    source = inspect.getsource(worker.init_model)
    assert "self.actor_worker_cls(" in source and "self.ref_worker_cls(" in source
    assert inspect.isclass(worker.actor_worker_cls) and inspect.isclass(worker.ref_worker_cls)


def test_the_mini_batch_loop_we_replace_still_sets_what_ours_sets() -> None:
    source = inspect.getsource(resolve("verl.workers.engine_workers:TrainingWorker.train_mini_batch"))
    for name in (
        "mini_batch_size",
        "num_mini_batch",
        "epochs",
        "seed",
        "dataloader_kwargs",
        "global_token_num",
        "update_lr_scheduler",
        "disable_auto_offload",
    ):
        assert name in source, name


def test_sync_mode_is_chosen_by_the_literal_name_only() -> None:
    source = inspect.getsource(trainer_class()._build_replay_buffer)
    assert '"sync"' in source


# -------------------------------------------------------------------------------------------------------- aggregation

LOSS = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0], [9.0, 9.0, 9.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", (1 + 2 + 4 + 3) / 20 * 2),
        ("seq-mean-token-mean", (7 / 3 + 3) / 6 * 2),
        ("seq-mean-token-sum-norm", (7 + 3) / 6 / 48 * 2),
    ],
)
def test_aggregation_divides_by_the_fixed_counts_it_is_given(mode: str, expected: float) -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    value = agg_loss(LOSS, MASK, mode, dp_size=2, batch_num_tokens=20, global_batch_size=6, loss_scale_factor=48)
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_verls_sequence_mean_equals_ours_where_every_weight_is_one() -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    from verl_ext.loss import aggregate

    for mode in ("token-mean", "seq-mean-token-mean"):
        theirs = agg_loss(LOSS, MASK, mode, batch_num_tokens=20, global_batch_size=6)
        ours = aggregate(LOSS, MASK, torch.ones(3), mode=mode, rows=6, tokens=20)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_ppo_loss_takes_its_denominators_from_the_batch() -> None:
    source = inspect.getsource(resolve("verl.workers.utils.losses:ppo_loss"))
    for name in ("dp_size", "batch_num_tokens", "global_batch_size"):
        assert f'config.global_batch_info["{name}"] = data["{name}"]' in source


# ----------------------------------------------------------------------------------------------------- engine registry


@pytest.fixture
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    from verl.workers.engine.base import BaseEngine, EngineRegistry

    monkeypatch.setattr(EngineRegistry, "_engines", {})
    engines = {name: type(name, (BaseEngine,), {}) for name in ("OfDevice", "OfVendor")}
    EngineRegistry.register(model_type="m", backend="b", device="d")(engines["OfDevice"])
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "d")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "v")
    return EngineRegistry, engines


def test_the_engine_registry_prefers_the_vendor_key(scratch_registry: Any) -> None:
    registry, engines = scratch_registry
    assert registry.get_engine_cls("m", "b") is engines["OfDevice"]
    registry.register(model_type="m", backend="b", device="d", vendor="v")(engines["OfVendor"])
    assert registry.get_engine_cls("m", "b") is engines["OfVendor"]


def test_the_engine_registry_refuses_a_key_that_is_taken(scratch_registry: Any) -> None:
    registry, engines = scratch_registry
    with pytest.raises(AssertionError, match="already"):
        registry.register(model_type="m", backend="b", device="d")(engines["OfVendor"])


def test_our_engine_is_the_one_verl_builds_and_verls_registration_is_left_alone() -> None:
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from verl_ext.engine import DistillEngine, register

    register()
    for backend in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls("language_model", backend) is DistillEngine
        assert EngineRegistry._engines["language_model"][backend]["cuda"] is FSDPEngineWithLMHead


def test_a_forward_only_engine_is_offloaded_because_of_one_flag() -> None:
    """Our engine lowers ``forward_only`` while the module is wrapped and moved; verl must read it there and then."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    assert "self.engine_config.forward_only" in inspect.getsource(FSDPEngine._build_fsdp_module)
    assert "self.engine_config.forward_only" in inspect.getsource(FSDPEngine.to)


# --------------------------------------------------------------------------------------------------- logits processor

PROMPTS, RESPONSES, VOCABULARY = [2, 4, 1], [3, 1, 5], 7
TEMPERATURE = 2.0


def micro_batch(packed: bool) -> TensorDict:
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCABULARY, (n,), generator=generator) for n in PROMPTS]
    responses = [torch.randint(VOCABULARY, (n,), generator=generator) for n in RESPONSES]
    inputs = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    batch = tu.get_tensordict(
        {
            "prompts": to_jagged(prompts),
            "responses": to_jagged(responses),
            "input_ids": to_jagged(inputs),
            "position_ids": to_jagged([torch.arange(len(row)) for row in inputs]),
        }
    )
    tu.assign_non_tensor(
        batch, use_remove_padding=packed, distillation_use_topk=True, distillation_only=True, temperature=TEMPERATURE
    )
    return batch


def run_model_outputs(packed: bool, processor: Callable[..., dict[str, torch.Tensor]]) -> tuple[Any, TensorDict, Any]:
    """verl's own input and output preparation around logits that name their position: logit 0 is 100 row + column."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as Engine

    fake = SimpleNamespace(
        use_ulysses_sp=False,
        pad_to_length=None,
        pass_packed_cu_seqlens=False,
        _get_packed_pad_size=lambda total: 0,
        _gather_and_unpad_packed=lambda tensor, pad: tensor[:-pad] if pad else tensor,
        engine_config=SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False),
    )
    batch = micro_batch(packed)
    inputs, output_args = Engine.prepare_model_inputs(fake, batch)
    sizes = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    logits = torch.zeros(*inputs["input_ids"].shape, VOCABULARY)
    if packed:
        places = [100.0 * row + column for row, size in enumerate(sizes) for column in range(size)]
        logits[0, :, 0] = torch.tensor(places)
    else:
        logits[:, :, 0] = -1.0
        for row, size in enumerate(sizes):
            logits[row, :size, 0] = 100.0 * row + torch.arange(size)
    output = SimpleNamespace(logits=logits)
    return Engine.prepare_model_outputs(fake, output, output_args, batch, processor), batch, output_args


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_processor_sees_packed_scaled_logits_and_its_output_comes_back_by_row(packed: bool) -> None:
    from verl.workers.utils.padding import no_padding_2_padding

    seen: dict[str, torch.Tensor] = {}

    def processor(*, student_logits: torch.Tensor, data: TensorDict) -> dict[str, torch.Tensor]:
        seen["shape"] = student_logits.shape
        seen["values"] = student_logits[0, :, 0] * TEMPERATURE
        return {"place": seen["values"][None]}

    model_output, batch, _ = run_model_outputs(packed, processor)
    total = sum(PROMPTS) + sum(RESPONSES)
    assert seen["shape"] == (1, total, VOCABULARY)
    assert "log_probs" not in model_output, "distillation_only must leave out verl's own log-probabilities"
    by_row = no_padding_2_padding(model_output["place"], batch)
    # A model output at column j predicts token j + 1: the response starts to be predicted at the last prompt token.
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = [100.0 * row + prompt - 1 + i for i in range(response)]
        assert by_row[row, :response].tolist() == pytest.approx(expected)
    positions = response_positions(lengths(batch["input_ids"]), lengths(batch["responses"]))
    ours = seen["values"][positions].split(RESPONSES)
    for row, response in enumerate(RESPONSES):
        assert ours[row].tolist() == pytest.approx(by_row[row, :response].tolist())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_processor_output_that_is_not_one_value_a_token_is_refused(packed: bool) -> None:
    def wide(*, student_logits: torch.Tensor, data: TensorDict) -> dict[str, torch.Tensor]:
        return {"wide": student_logits[..., :2]}

    with pytest.raises(AssertionError, match="shape"):
        run_model_outputs(packed, wide)


def test_packed_positions_predict_the_response_tokens_in_verls_rolled_labels() -> None:
    _, batch, output_args = run_model_outputs(True, lambda **_: {})
    positions = response_positions(lengths(batch["input_ids"]), lengths(batch["responses"]))
    assert output_args["input_ids_rmpad_rolled"][positions].tolist() == batch["responses"].values().tolist()


def test_the_engine_calls_the_loss_function_as_our_loss_and_passes_expect() -> None:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    source = inspect.getsource(FSDPEngineWithLMHead.forward_step)
    assert "model_output=model_output" in source and "data=micro_batch" in source and "dp_group=" in source
    assert "logits_processor_func=loss_function" in source


# ------------------------------------------------------------------------------------------------- rows, metas, metrics


def test_verls_padding_rows_copy_the_fields_of_a_real_row_and_zero_what_verl_knows() -> None:
    from verl.trainer.ppo.padding_utils import SYNTHETIC_PADDING_SEQ_LEN, construct_minimal_padding_template

    row = {
        "uid": "a1",
        "prompts": torch.tensor([5, 6]),
        "responses": torch.tensor([7]),
        "position_ids": torch.arange(3),
        "rm_scores": torch.tensor([1.0]),
        "distill_weight": torch.tensor(2.5),
    }
    template, tag = construct_minimal_padding_template(row, {"status": "success", "prompt_len": 2}, eos_token_id=9)
    assert SYNTHETIC_PADDING_SEQ_LEN == PADDING_ROW_TOKENS
    assert len(template["input_ids"]) == PADDING_ROW_TOKENS and template["responses"].tolist() == [9]
    assert template["response_mask"].tolist() == template["loss_mask"].tolist() == [0]
    assert template["rm_scores"].tolist() == [0.0]
    assert float(template["distill_weight"]) == 2.5, "fields of ours are copied: they must be zeroed by us"
    assert tag["is_padding"] is True and is_padding_row(template["uid"], tag)


def test_the_uid_of_a_padding_row_begins_with_pad_and_real_uids_never_do() -> None:
    source = inspect.getsource(resolve("verl.trainer.ppo.padding_utils:upsample_batch_to_divisible_size"))
    assert 'f"pad{uuid' in source
    assert is_padding_row("pad0123") and not is_padding_row("0123pad")
    assert not any(is_padding_row(character * 32) for character in "0123456789abcdef")


def test_a_batch_meta_has_the_fields_we_copy_and_refuses_repeated_keys() -> None:
    from transfer_queue import KVBatchMeta

    names = {field.name for field in dataclasses.fields(KVBatchMeta)}
    assert {"keys", "tags", "partition_id", "fields", "extra_info"} <= names
    meta = KVBatchMeta(partition_id="train", keys=["a_0_0"], tags=[{}])
    assert meta.fields is None and meta.extra_info == {}
    with pytest.raises(ValueError, match="duplicated"):
        KVBatchMeta(keys=["a", "a"], tags=[{}, {}])


def test_keys_are_uid_rollout_and_output_number() -> None:
    from verl_ext.rollout_rows import _split_key

    source = inspect.getsource(resolve("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._agent_loop_postprocess"))
    assert "uid" in source and "session_id" in source
    assert _split_key("0a_1b_3_0") == ("0a_1b", 3, 0)


def test_metric_lists_are_reduced_by_substrings_of_their_names() -> None:
    from verl.utils.metric import reduce_metrics

    values = [1.0, 2.0, 6.0]
    reduced = reduce_metrics({"x": list(values), "x_max": list(values), "elimination": list(values)})
    assert reduced == {"x": 3.0, "x_max": 6.0, "elimination": 1.0}, "why no metric of ours holds 'min' or 'max'"


def test_a_sum_metric_adds_over_micro_batches_and_averages_over_ranks() -> None:
    from verl.utils.metric import AggregationType, Metric

    ranks = []
    for rank in (1.0, 2.0):
        metric = Metric(value=torch.tensor(rank), aggregation=AggregationType.SUM)
        metric.append(torch.tensor(10.0))
        ranks.append(metric)
    # Why our loss carries a factor of the number of ranks.
    assert float(Metric.aggregate_dp(ranks)) == pytest.approx((11.0 + 12.0) / 2)


def test_advantage_estimators_of_ours_are_registered_with_verl() -> None:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    import verl_ext.advantage as advantage

    assert get_adv_estimator_fn("pass_rate_kernel") is advantage.compute_pass_rate_kernel_advantage
    assert get_adv_estimator_fn("self_teacher") is advantage.compute_self_teacher_advantage


def test_the_grouped_agent_loop_writes_the_fields_and_tags_that_verls_own_writes() -> None:
    theirs = inspect.getsource(resolve("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._agent_loop_postprocess"))
    from verl_ext.agent_loops import GroupedAgentLoopWorker

    ours = inspect.getsource(GroupedAgentLoopWorker._hand_on)
    for name in (
        "status",
        "prompt_len",
        "response_len",
        "seq_len",
        "global_steps",
        "min_global_steps",
        "max_global_steps",
        "loss_mask",
        "input_ids",
        "position_ids",
        "multi_modal_inputs",
    ):
        assert f'"{name}"' in theirs and f'"{name}"' in ours, name


def test_a_reward_dict_s_score_is_the_reward_and_the_rest_goes_to_the_row() -> None:
    source = inspect.getsource(resolve("verl.experimental.reward_loop.reward_manager.naive:NaiveRewardManager"))
    assert 'result["score"]' in source and "reward_extra_info" in source
