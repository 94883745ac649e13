//! A pod whose image comes from a registry, by the command line.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migrator::api::image_types::{ImageList, TransferEvent};
use migrator_tests::lab::{POD, POD_IPV4, POD_IPV6, TestLab, pod_yaml};
use migrator_tests::registry::Registry;
use xtask::lab::Node;
use xtask::process::poll_until;
use xtask::{cmd, demo_image, netns};

/// For a dozen megabytes, beside a guest that is emulated.
const FILLS_WITHIN: Duration = Duration::from_secs(60);

/// What `image gc` prints of images, one a line.
fn cleared(test: &TestLab, words: &[&str]) -> Result<String> {
    test.succeeds(Node::A, &[&["image", "gc"], words].concat())
}

#[test]
fn a_pod_runs_from_a_registry_and_its_image_goes_when_nobody_needs_it() -> Result<()> {
    let test = TestLab::up()?;
    let place = test.lab().netns("a");
    let demo = demo_image::ensure(test.project())?;
    let registry = netns::within(&place, || {
        cmd::run(&mut cmd::command("ip", ["link", "set", "lo", "up"]))?;
        let registry = Registry::open()?;
        let source = format!("oci:{}:{}", demo.display(), demo_image::REFERENCE);
        registry.store(&source, "team/demo:1", &[])?;
        Ok(registry)
    })?;
    let image = format!("{}/team/demo:1", registry.address());
    let yaml = pod_yaml(POD, POD_IPV4, POD_IPV6).replace(demo_image::REFERENCE, &image);
    let file = test.lab().dir().join("registry-pod.yaml");
    std::fs::write(&file, yaml)?;
    let run = ["run", file.to_str().context("a path that is not UTF-8")?];

    // Without its image the pod is refused, and it is said how to get it.
    let said = test.says(Node::A, &run)?;
    ensure!(said.code == Some(3), "{said:?}");
    ensure!(
        said.err.contains(&format!("image pull {image}")),
        "{said:?}"
    );

    let said = test.says(Node::A, &["image", "pull", &image])?;
    ensure!(said.code == Some(1), "{said:?}");
    ensure!(said.err.contains("--plain-http"), "{said:?}");
    let missing = format!("{}/team/other:1", registry.address());
    let said = test.says(Node::A, &["image", "pull", "--plain-http", &missing])?;
    ensure!(said.code == Some(3), "{said:?}");

    let pull = ["--output", "json", "image", "pull", "--plain-http", &image];
    let out = test.succeeds(Node::A, &pull)?;
    let last = out.lines().last().context("no event")?;
    let TransferEvent::Pulled { image: pulled, .. } = serde_json::from_str(last)? else {
        anyhow::bail!("the last event is {last}");
    };
    ensure!(pulled.name == image, "{pulled:?}");
    ensure!(pulled.leased_until_unix_ms.is_some(), "{pulled:?}");

    ensure!(!cleared(&test, &[])?.contains(&image), "it is leased");
    test.succeeds(Node::A, &run)?;
    test.exec_works(Node::A)?;
    test.succeeds(Node::A, &["image", "lease", &image, "--for", "0"])?;
    ensure!(!cleared(&test, &[])?.contains(&image), "the pod uses it");
    test.succeeds(Node::A, &["stop", POD])?;
    ensure!(cleared(&test, &["--dry-run"])?.contains(&image));
    ensure!(cleared(&test, &[])?.contains(&image));
    let list = test.succeeds(Node::A, &["image", "ls"])?;
    ensure!(!list.contains(&image), "{list}");
    drop(registry);
    test.end()
}

#[test]
fn a_pod_starts_before_its_image_is_there() -> Result<()> {
    let test = TestLab::up()?;
    let place = test.lab().netns("a");
    let demo = demo_image::ensure(test.project())?;
    let registry = netns::within(&place, || {
        cmd::run(&mut cmd::command("ip", ["link", "set", "lo", "up"]))?;
        Registry::open()
    })?;
    let image = format!("{}/team/demo:1", registry.address());
    let layout = demo.to_str().context("a path that is not UTF-8")?;
    test.succeeds(
        Node::A,
        &["image", "import", "--keep-layers", "--name", &image, layout],
    )?;
    let push = ["image", "push", "--chunks", "--plain-http", &image];
    let pushed = test.succeeds(Node::A, &push)?;
    ensure!(pushed.contains("chunks sha256:"), "{pushed}");
    test.succeeds(Node::A, &["image", "rm", &image])?;
    test.succeeds(Node::A, &["image", "gc"])?;

    let pull = [
        "--output",
        "json",
        "image",
        "pull",
        "--lazy",
        "--plain-http",
        &image,
    ];
    let out = test.succeeds(Node::A, &pull)?;
    let last = out.lines().last().context("no event")?;
    let TransferEvent::Pulled {
        image: pulled,
        transferred_bytes,
    } = serde_json::from_str(last)?
    else {
        anyhow::bail!("the last event is {last}");
    };
    ensure!(transferred_bytes < pulled.size_bytes / 4, "{last}");
    let yaml = pod_yaml(POD, POD_IPV4, POD_IPV6).replace(demo_image::REFERENCE, &image);
    let file = test.lab().dir().join("lazy-pod.yaml");
    std::fs::write(&file, yaml)?;
    test.succeeds(
        Node::A,
        &["run", file.to_str().context("a path that is not UTF-8")?],
    )?;
    test.exec_works(Node::A)?;
    // And the rest comes, although the pod does not read it.
    let whole = poll_until(FILLS_WITHIN, || {
        let list = test.succeeds(Node::A, &["--output", "json", "image", "ls"]);
        let list = list
            .ok()
            .and_then(|text| serde_json::from_str::<ImageList>(&text).ok());
        list.is_some_and(|list| {
            list.images
                .iter()
                .all(|image| image.here_bytes == image.size_bytes)
        })
    });
    ensure!(whole, "the image is not filled");
    test.succeeds(Node::A, &["stop", POD])?;
    drop(registry);
    test.end()
}
