# SPDX-License-Identifier: Apache-2.0
"""What `make cuda-check` concludes from machine code, on small disassembled kernels, and its arithmetic."""

import re
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from test_build import load

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = Path(__file__).parent / "sass"
pytestmark = pytest.mark.level_independent

sass = load(ROOT / "build_support" / "sass.py")
occupancy = load(ROOT / "build_support" / "occupancy.py")
device_code = load(ROOT / "build_support" / "device_code.py")
kernel_report = load(ROOT / "build_support" / "kernel_report.py")


@pytest.fixture(scope="module")
def cuda_check() -> ModuleType:
    pytest.importorskip("rich")
    sys.path.insert(0, str(ROOT / "build_support"))
    try:
        return load(ROOT / "build_support" / "cuda_check.py")
    finally:
        sys.path.pop(0)


def sample(name: str):
    (kernel,) = sass.parse((SAMPLES / f"{name}.sass").read_text())
    assert kernel.name == name
    return kernel


class TestMachineCode:
    def test_instructions_are_read_with_predicates_modifiers_and_labels(self):
        text = (
            '\t.section\t.text.f,"ax",@progbits\n'
            "        /*0000*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;\n"
            ".L_x_1:\n"
            "        /*0010*/               @P1 BRA `(.L_x_1) ;\n"
            "        /*0020*/                   EXIT ;\n"
        )
        (kernel,) = sass.parse(text)
        assert [each.opcode for each in kernel.instructions] == ["LDG.E.128.CONSTANT", "BRA", "EXIT"]
        assert kernel.instructions[0].modifiers == ["E", "128", "CONSTANT"]
        assert kernel.labels == {".L_x_1": 1}
        assert kernel.loops() == []  # a branch to itself ends a kernel

    def test_a_good_product_has_nothing_to_report(self):
        kernel = sample("good_product")
        assert sass.missing_from_hot_loop(kernel) == []
        assert sass.local_memory_accesses(kernel) == []
        assert sass.narrow_stores(kernel) == []
        loop = kernel.hot_loop("HMMA")
        assert sass.count(loop, "HMMA") == 1
        assert sass.count(loop, "BAR") == 1
        assert len(loop) < len(kernel.instructions)

    @pytest.mark.parametrize(
        ("name", "missing"),
        [
            ("without_ldmatrix", ["no LDSM in the hot loop"]),
            ("copies_of_four_bytes", ["no 16-byte LDGSTS in the hot loop"]),
            ("narrow_store", ["no loop with HMMA"]),
        ],
    )
    def test_what_a_hot_loop_lacks_is_found(self, name, missing):
        assert sass.missing_from_hot_loop(sample(name)) == missing

    def test_what_stands_outside_of_the_hot_loop_does_not_count(self):
        """A prologue's 16-byte copies, and the outer loop's, must not stand in for those of the inner loop."""
        text = (SAMPLES / "copies_of_four_bytes.sass").read_text()
        first = re.search(r"^(\s+/\*[0-9a-f]+\*/\s+)\S.*;", text, re.MULTILINE)
        copy = f"{first[1]}LDGSTS.E.BYPASS.128 [R5], [R8.64] ;\n"
        around = f".L_x_outer:\n{copy}"
        text = text[: first.start()] + around + text[first.start() :]
        text = text.rstrip("\n") + f"\n{first[1]}BRA `(.L_x_outer) ;\n"
        (kernel,) = sass.parse(text)
        assert len(kernel.loops()) == 2
        assert sass.missing_from_hot_loop(kernel) == ["no 16-byte LDGSTS in the hot loop"]

    def test_local_memory_is_found(self):
        found = sass.local_memory_accesses(sample("local_array"))
        assert [re.sub(r"\d+ ", "", each) for each in found] == ["LDL (local memory)", "STL (local memory)"]

    def test_a_two_byte_store_is_found(self):
        assert sass.narrow_stores(sample("narrow_store")) == ["1 STG.E.U16 (narrow global store)"]


class TestOccupancy:
    """Against NVIDIA's own tables, worked by hand."""

    @pytest.mark.parametrize(
        ("arch", "threads", "registers", "shared", "blocks"),
        [
            ("sm_80", 128, 32, 0, 16),  # warps: 64 / 4
            ("sm_80", 32, 32, 0, 32),  # blocks
            ("sm_80", 128, 255, 0, 2),  # registers: 8 warps of 8192
            ("sm_80", 128, 168, 0, 3),  # registers: 4 * (16384 // 5376) = 12 warps
            ("sm_80", 96, 168, 0, 4),
            ("sm_80", 256, 64, 48 * 1024, 3),  # shared: 164 // 49
            ("sm_80", 128, 32, 163 * 1024, 1),
            ("sm_80", 128, 32, 164 * 1024, 0),  # one KiB is the system's
            ("sm_90", 128, 255, 96 * 1024, 2),
            ("sm_100", 128, 128, 64 * 1024, 3),
            ("sm_110", 128, 32, 0, 12),  # warps: 48 / 4
            ("sm_110", 32, 16, 0, 24),  # blocks
            ("sm_120", 128, 32, 0, 12),  # warps: 48 / 4
            ("sm_120", 32, 16, 0, 24),  # blocks
            ("sm_120", 128, 32, 50 * 1024, 1),
        ],
    )
    def test_blocks(self, arch, threads, registers, shared, blocks):
        assert occupancy.blocks_per_sm(arch, threads, registers, shared) == blocks


class TestBounds:
    GPU = kernel_report.Gpu("toy", "sm_80", 2, 1e9, 1e9, {"bfloat16": 1e12})
    TILE = SimpleNamespace(math="bfloat16", tile_m=64, tile_n=32, tile_k=16, warps=4)

    def test_each_bound_by_hand(self):
        problem = kernel_report.Problem(tokens=70, rows=130, experts=2, width=40, depth=48, element_bytes=2)
        limit = kernel_report.bound(self.GPU, problem, self.TILE, 100)
        assert problem.flops == 2 * 130 * 40 * 48
        assert problem.least_bytes == 2 * (70 * 48 + 2 * 40 * 48 + 130 * 40)
        assert limit.arithmetic == pytest.approx(problem.flops / 1e12)
        assert limit.memory == pytest.approx(problem.least_bytes / 1e9)
        steps = 2 * 2 * 2 * 3  # experts, row tiles of 65 rows, column tiles, steps of the depth
        assert limit.issue == pytest.approx(steps * 4 * 100 / (4 * 2 * 1e9))
        assert limit.tile_bytes == steps * 96 * 16 * 2 + 130 * 40 * 2
        assert limit.seconds == max(limit.arithmetic, limit.memory, limit.issue)


class TestReading:
    def test_policies(self, cuda_check):
        text = (
            "sm_80, bfloat16, many rows: 128 x 64 x 32, 4 stages, 2 x 3 warps, at most 255 registers, 2 blocks per SM, "
            "98304 bytes of shared memory\n"
            "sm_90, bfloat16, many rows: 1 x 1 x 1, 1 stages, 1 x 1 warps, at most 1 registers, 1 blocks per SM, "
            "1 bytes\n"
        )
        policies = cuda_check.parse_policies(text, "sm_80")
        assert len(policies) == 3
        tile = policies["forward", "bfloat16", "many rows"]
        assert (tile.tile_m, tile.tile_n, tile.tile_k, tile.warps) == (128, 64, 32, 6)
        assert (tile.registers, tile.shared) == (255, 98304)

    def test_the_policy_prints_what_is_read_here(self, cuda_check):
        tables = {arch: cuda_check.policy_table(arch) for arch in ("sm_80", "sm_90", "sm_100a", "sm_110", "sm_120")}
        assert all(len(table) == 3 * 4 * 5 for table in tables.values())
        assert tables["sm_110"] == tables["sm_100a"] != tables["sm_120"]

    def test_names_are_shortened(self, cuda_check):
        name = (
            "void dynamic_moe::tile_kernel<dynamic_moe::TileConfig<(dynamic_moe::Product)0, (dynamic_moe::Math)1, "
            "(dynamic_moe::Regime)2>, dynamic_moe::StoreRows<__half, (bool)1> >(dynamic_moe::Operands<__half>, int)"
        )
        expected = "tile_kernel<TileConfig<forward, float16, many rows>, StoreRows<float16, 1> >"
        assert cuda_check.shortened(name) == expected

    def test_threads_are_read_from_a_cubin(self, cuda_check):
        names = b"\0.shstrtab\0.nv.info.f\0"
        info = b"\x04\x37\x04\x00aaaa\x04\x05\x0c\x00" + struct.pack("<III", 32, 4, 2)
        header = bytearray(64)
        struct.pack_into("<Q", header, 0x28, 64 + len(names) + len(info))
        struct.pack_into("<HHH", header, 0x3A, 64, 2, 0)
        sections = struct.pack("<IIQQQQ24x", 1, 3, 0, 0, 64, len(names))
        sections += struct.pack("<IIQQQQ24x", 11, 1, 0, 0, 64 + len(names), len(info))
        assert cuda_check.max_threads(bytes(header) + names + info + sections) == {"f": 256}


class TestDeviceCode:
    """What cuobjdump 13.5 prints of objects, and what devices make of them."""

    CUBINS = "".join(
        f"ELF file    {number}: permute_cuda.{number}.sm_{arch}.cubin\n"
        for number, arch in enumerate((80, 90, 100, 110, 120), 1)
    )
    PTX = "PTX file    1: permute_cuda.1.sm_80.ptx\nPTX file    2: permute_cuda.2.sm_120.ptx\n"

    def runs(self, cubins: str, ptx: str) -> dict[str, str | None]:
        cubins, ptx = device_code.targets(cubins), device_code.targets(ptx)
        return {device: device_code.code_of(device, cubins, ptx) for device in device_code.DEVICES}

    def test_a_default_build_has_code_for_every_device(self):
        assert self.runs(self.CUBINS, self.PTX) == {
            "8.0": "sm_80",
            "8.6": "sm_80",
            "8.7": "PTX of compute_80",
            "8.8": "PTX of compute_80",
            "8.9": "sm_80",
            "9.0": "sm_90",
            "10.0": "sm_100",
            "10.3": "sm_100",
            "11.0": "sm_110",
            "12.0": "sm_120",
            "12.1": "sm_120",
        }
        assert device_code.code_of("13.0", set(), device_code.targets(self.PTX)) == "PTX of compute_120"

    def test_a_targets_leave_devices_without_code(self):
        cubins = self.CUBINS.replace("sm_90", "sm_90a").replace("sm_100", "sm_100a").replace("sm_110", "sm_999")
        runs = self.runs(cubins, self.PTX.partition("\n")[2])
        assert [device for device, code in runs.items() if code is None] == ["8.7", "8.8", "10.3", "11.0"]
        assert runs["9.0"] == "sm_90a"

    def test_f_targets_run_on_their_family_and_machine_code_on_no_lower_minor_number(self):
        runs = self.runs("x.1.sm_100f.cubin\nx.2.sm_86.cubin\nx.3.sm_121.cubin\n", "")
        assert {device for device, code in runs.items() if code} == {"8.6", "8.9", "10.0", "10.3", "12.1"}

    def test_an_object_without_code_for_a_device_fails_the_check(self, cuda_check, monkeypatch, tmp_path, capsys):
        kernel = cuda_check.judge("sm_80", sample("good_product"), "f", 128, 40, 0, {})
        complete = cuda_check.Object(Path("a.cu"), [kernel], *map(device_code.targets, (self.CUBINS, self.PTX)))
        without_ptx = cuda_check.Object(Path("b.cu"), [kernel], complete.cubins, set())
        monkeypatch.setattr(cuda_check, "cuda_toolkit", lambda: tmp_path)
        monkeypatch.setattr(cuda_check, "cuda_architectures", lambda _: "8.0")
        monkeypatch.setattr(cuda_check, "nvcc_version", lambda _: "13.0")
        monkeypatch.setattr(cuda_check, "build_all", lambda *_: [])
        monkeypatch.setattr(sys, "argv", ["cuda_check.py", "--report", str(tmp_path / "report.md")])
        for objects, status in (([complete], 0), ([complete, without_ptx], 1)):
            monkeypatch.setattr(cuda_check, "examine_all", lambda *_, objects=objects: objects)
            assert cuda_check.main() == status
        assert "b.cu: no code for devices of compute capability 8.7, 8.8\n" in capsys.readouterr().out
        monkeypatch.setattr(cuda_check, "PAGE", tmp_path / "report.md")
        monkeypatch.setattr(sys, "argv", ["cuda_check.py", "--if-changed"])
        assert cuda_check.main() == 0
        monkeypatch.setattr(cuda_check, "nvcc_version", lambda _: "13.1")
        assert cuda_check.main() == 1
        report = (tmp_path / "report.md").read_text()
        assert "| 9.0 | H100, H200 | sm_90 |" in report
        assert "| 8.7 | Jetson Orin | **none** |" in report


class TestRules:
    @pytest.fixture
    def policies(self, cuda_check):
        tile = cuda_check.Tile("forward", "bfloat16", "many rows", 128, 128, 32, 4, 4, 100, 1024)
        return {("forward", "bfloat16", "many rows"): tile}

    NAME = "tile_kernelINS_10TileConfigILNS_7ProductE0ELNS_4MathE0ELNS_6RegimeE2EEE"

    def judge(self, cuda_check, policies, name, registers=100):
        kernel = sample(name)
        kernel = sass.Kernel(self.NAME, kernel.instructions, kernel.labels)
        return cuda_check.judge("sm_80", kernel, "f", 128, registers, 512, policies)

    def test_a_good_product_passes(self, cuda_check, policies):
        result = self.judge(cuda_check, policies, "good_product")
        assert result.findings == []
        assert result.shared == 512 + 1024
        assert result.loop_multiplying == 1

    def test_too_many_registers(self, cuda_check, policies):
        findings = self.judge(cuda_check, policies, "good_product", registers=101).findings
        assert findings == ["101 registers, the policy says at most 100"]

    def test_a_product_with_all_faults(self, cuda_check, policies):
        assert self.judge(cuda_check, policies, "narrow_store").findings == [
            "1 STG.E.U16 (narrow global store)",
            "no loop with HMMA",
        ]
        assert self.judge(cuda_check, policies, "without_ldmatrix").findings == ["no LDSM in the hot loop"]

    def test_local_memory_is_a_fault_of_any_kernel(self, cuda_check):
        result = cuda_check.judge("sm_80", sample("local_array"), "f", 128, 40, 0, {})
        assert len(result.findings) == 2
