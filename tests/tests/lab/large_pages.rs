//! Pods whose memory is made of large pages: reserved ones (hugetlbfs), and the kernel's own (THP).

use anyhow::{Result, ensure};
use migrator_tests::lab::{POD, POD_IPV4, POD_IPV6, SOON, TestLab, pod_yaml};
use migrator_tests::large_pages::{Setting, largest_kib};
use vm_runtime::memory::{HUGE_PAGE, huge_pages_available};
use vm_runtime::units::Bytes;
use vm_runtime::vm::VmRecord;
use xtask::lab::Node;
use xtask::process::poll_until;

use crate::refused;

/// RAM of the pod of [`pod_yaml`].
const RAM: Bytes = Bytes::mib(256);

/// A figure of the memory map of the pod's VMM, in bytes.
fn mapped(test: &TestLab, node: Node, name: &str) -> Result<u64> {
    let record = VmRecord::load(&test.state(node).join("pods").join(POD))?;
    Ok(largest_kib(record.pid, name)? * 1024)
}

/// Waits until so many huge pages are available.
fn available(wanted: Bytes) -> Result<()> {
    let there = poll_until(SOON, || huge_pages_available() == wanted);
    let now = huge_pages_available();
    ensure!(
        there,
        "{now} of huge pages are available, instead of {wanted}"
    );
    Ok(())
}

#[test]
fn a_pod_of_reserved_huge_pages_moves_to_where_there_are_enough() -> Result<()> {
    let mut test = TestLab::up()?;
    let plain = pod_yaml(POD, POD_IPV4, POD_IPV6);
    let yaml = plain.replace("spec:\n", "    migrator/hugepages: \"true\"\nspec:\n");
    ensure!(yaml != plain, "the annotation has no place");
    // Both nodes have one kernel.
    let _none = Setting::huge_pages(Bytes(0))?;
    let said = test
        .run_pod_of(&yaml)
        .err()
        .map(|error| format!("{error:#}"));
    ensure!(
        said.as_ref()
            .is_some_and(|said| said.contains("vm.nr_hugepages")),
        "run says {said:?}"
    );
    test.nothing_is_left_on(Node::A)?;

    let _one = Setting::huge_pages(RAM)?;
    test.run_pod_of(&yaml)?;
    available(Bytes(0))?;
    refused(&test, &["b has 0 B", "vm.nr_hugepages"])?;
    test.nothing_is_left_on(Node::B)?;

    let _two = Setting::huge_pages(RAM)?;
    for mode in ["postcopy", "hybrid"] {
        let said = test.says(Node::A, &["migrate", POD, "--to", "b", "--mode", mode])?;
        ensure!(
            said.code != Some(0) && said.err.contains("huge pages"),
            "{said:?}"
        );
    }
    for from in Node::ALL {
        let to = from.other();
        let counted = test.log_goes_on(from, 0)?;
        let report = test.moves(from)?;
        ensure!(report.mode == "precopy", "{report:?}");
        println!("downtime {:.1} ms", report.downtime_ms);
        ensure!(
            mapped(&test, to, "KernelPageSize")? == HUGE_PAGE,
            "it has small pages"
        );
        test.nothing_is_left_on(from)?;
        available(RAM)?;
        test.log_goes_on(to, counted)?;
        test.exec_works(to)?;
        test.probe_is_perfect()?;
        test.start_probe()?;
        // What the next service knows of it, it has from the VMM; and another VMM can have its memory.
        test.restart(to, || Ok(()))?;
        test.runs_on(to)?;
        test.succeeds(to, &["upgrade", POD])?;
        available(RAM)?;
    }
    test.end()?;
    available(Bytes(2 * RAM.0))
}

#[test]
fn a_pod_of_transparent_huge_pages_moves_in_every_mode() -> Result<()> {
    // Not only where QEMU asks for them, but also where pages are written to the RAM file.
    let _always = Setting::shmem("always")?;
    let mut test = TestLab::with_pod()?;
    let mut from = Node::A;
    for mode in ["precopy", "hybrid", "postcopy", "auto"] {
        let huge = mapped(&test, from, "ShmemPmdMapped")?;
        ensure!(
            huge > 0 || mode != "precopy",
            "the guest has no transparent huge page"
        );
        let options = [
            "--mode",
            mode,
            "--max-downtime",
            if mode == "hybrid" { "1" } else { "300" },
        ];
        let report = test.moves_with(from, &options)?;
        println!(
            "{mode}: {} of huge pages before, {} after; {} with a downtime of {:.1} ms",
            Bytes(huge),
            Bytes(mapped(&test, from.other(), "ShmemPmdMapped")?),
            report.mode,
            report.downtime_ms
        );
        test.probe_is_perfect()?;
        test.exec_works(from.other())?;
        test.nothing_is_left_on(from)?;
        test.start_probe()?;
        from = from.other();
    }
    test.end()
}
