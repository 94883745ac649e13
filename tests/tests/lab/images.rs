//! Pods that move before their images are there.

use anyhow::{Context, Result, ensure};
use migrator::api::types::{ImageInfo, PodDetail};
use migrator::migration::status::{ImageReport, Phase};
use migrator_tests::lab::{POD, POD_IPV4, POD_IPV6, SOON, TestLab, pod_yaml};
use xtask::lab::Node;
use xtask::process::poll_until;
use xtask::{data_image, demo_image};

/// The data of the image, in MiB. An emulated guest hashes one or two of them a second on a busy machine.
const MIB: u32 = 48;

/// The usual pod, of the image with data.
fn yaml() -> String {
    let usual = pod_yaml(POD, POD_IPV4, POD_IPV6);
    usual.replace(demo_image::REFERENCE, data_image::REFERENCE)
}

/// The image of the pod, as its node shows it.
fn image(test: &TestLab, node: Node) -> Result<ImageInfo> {
    let pod: PodDetail = test.get(node, &format!("/v1/pods/{POD}"))?;
    pod.images
        .into_iter()
        .next()
        .context("a pod without images")
}

/// The hashes of all data, as the pod reads it.
fn sums(test: &TestLab, node: Node) -> Result<String> {
    let all = format!("sha256sum /{}/*", data_image::FOLDER);
    test.succeeds(node, &["exec", POD, "--", "/bin/sh", "-c", &all])
}

fn comes_to(
    test: &TestLab,
    node: Node,
    what: &str,
    wanted: impl Fn(&ImageInfo) -> bool,
) -> Result<()> {
    let mut last = None;
    poll_until(SOON, || {
        last = image(test, node).ok();
        last.as_ref().is_some_and(&wanted)
    });
    let came = last.as_ref().is_some_and(wanted);
    ensure!(came, "the image does not come to {what}: {last:?}");
    Ok(())
}

#[test]
fn a_pod_moves_before_its_image_is_there_and_reads_all_of_it_while_the_source_is_killed()
-> Result<()> {
    let mut test = TestLab::up()?;
    let layout = data_image::ensure(test.project(), MIB)?;
    test.import(Node::A, &layout, &[])?;
    test.run_pod_of(&yaml())?;
    // Before any chunk but the first ones has come, its source is gone.
    let id = test.begins(Node::A, &[])?;
    test.comes_to(Node::A, &id, "the destination's guest", |status| {
        status.phase == Phase::Forwarding
    })?;
    test.lab().kill_node(Node::A)?;
    test.runs_on(Node::B)?;
    let here = image(&test, Node::B)?;
    ensure!(here.here_bytes * 4 < here.size_bytes, "{here:?}");
    let read = std::thread::scope(|scope| -> Result<String> {
        let reader = scope.spawn(|| sums(&test, Node::B));
        // The pod waits, and its node says for what.
        let waits = comes_to(&test, Node::B, "a wait that is explained", |image| {
            image.waiting > 0 && image.problem.is_some()
        });
        // A service that is started again goes on, and the pod's reads do.
        let again = test.restart(Node::B, || Ok(()));
        let started = test.lab().start_node(Node::A);
        let read = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        waits.and(again).and(started)?;
        match read {
            Ok(read) => Ok(read),
            // What the command said went by way of the service that was killed.
            Err(_) => sums(&test, Node::B),
        }
    })?;
    ensure!(read == data_image::sums(MIB), "the pod reads {read}");
    comes_to(&test, Node::B, "its end", |image| {
        image.here_bytes == image.size_bytes
    })?;
    test.succeeds(Node::B, &["image", "verify", data_image::REFERENCE])?;
    test.nothing_is_left_on(Node::A)?;
    // The way back: nothing crosses.
    let report = test.moves(Node::B)?;
    let moved = report.images.context("no images in the report")?;
    ensure!(
        moved.bytes_here == moved.bytes_size && moved.bytes_before_resume == 0,
        "{moved:?}"
    );
    test.end()
}

#[test]
fn all_of_an_image_crosses_before_the_grant_where_that_is_wished_and_else_little() -> Result<()> {
    let mut test = TestLab::up()?;
    let layout = data_image::ensure(test.project(), MIB)?;
    test.import(Node::A, &layout, &[])?;
    test.run_pod_of(&yaml())?;
    let moved = |report: migrator::migration::status::MigrationReport| -> Result<ImageReport> {
        println!("{:?}", report.images);
        report.images.context("no images in the report")
    };
    let all = moved(test.moves_with(Node::A, &["--images", "complete"])?)?;
    ensure!(
        all.bytes_before_resume * 20 > all.bytes_size * 19,
        "{all:?}"
    );
    // It depends on nobody.
    test.restart(Node::A, || {
        ensure!(sums(&test, Node::B)? == data_image::sums(MIB));
        let verify = ["image", "verify", data_image::REFERENCE];
        test.succeeds(Node::B, &verify).map(drop)
    })?;
    // The other way, to a node that has nothing of it any more.
    test.succeeds(Node::A, &["image", "rm", data_image::REFERENCE])?;
    let little = moved(test.moves(Node::B)?)?;
    ensure!(little.bytes_here * 20 < little.bytes_size, "{little:?}");
    ensure!(
        little.bytes_before_resume * 20 < little.bytes_size,
        "{little:?}"
    );
    ensure!(sums(&test, Node::A)? == data_image::sums(MIB));
    test.end()
}
