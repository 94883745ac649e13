//! The lab, and in its client's namespace a registry that has the image and its chunks, behind a link that can be limited.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::layout;
use crate::lab::{Lab, Node, Owner};
use crate::process::poll_until;
use crate::project::Project;
use crate::{cmd, netns};

/// Where pods are started.
pub(super) const NODE: Node = Node::A;
/// Where the image is made and pushed from: the other never had it.
const MAKER: Node = Node::B;

/// The registry's address, in the nodes' own network.
const ADDRESS: &str = "10.78.0.100";
const PORT: u16 = 5000;

const COMES_UP_WITHIN: Duration = Duration::from_secs(30);

/// What is up. Dropping it takes all of it down.
pub(super) struct Ground {
    registry: Child,
    lab: Lab,
}

impl Drop for Ground {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.registry.kill();
        let _ = self.registry.wait();
        if let Err(error) = self.lab.down() {
            println!("bench: {error:#}");
        }
    }
}

impl Ground {
    /// Brings it up, with an image of so many MiB in the registry.
    ///
    /// # Errors
    /// A lab is up, or something does not come up.
    pub(super) fn up(project: &Project, mib: u32) -> Result<Ground> {
        let lab = Lab::new(project)?;
        if Node::ALL.iter().any(|node| lab.is_running(*node)) {
            bail!(
                "a lab is up: the benchmark would replace it, so take it down first with `cargo xtask lab down`"
            );
        }
        let layout = layout::ensure(project, mib)?;
        println!("bench: bringing the lab up");
        lab.up(Owner::Demo)?;
        let registry = match registry(&lab) {
            Ok(registry) => registry,
            Err(error) => {
                lab.down()?;
                return Err(error);
            }
        };
        let ground = Ground { registry, lab };
        ground.wait_for_registry()?;
        println!("bench: pushing the image and its chunks");
        let image = ground.image();
        let import = ["image", "import", "--keep-layers", "--name", &image];
        cmd::output(ground.lab.on(MAKER).args(import).arg(&layout))?;
        cmd::output(ground.lab.on(MAKER).args([
            "image",
            "push",
            "--chunks",
            "--plain-http",
            &image,
        ]))?;
        ground.clear(MAKER)?;
        ground.make_template()?;
        Ok(ground)
    }

    pub(super) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The image's name, for both sides.
    pub(super) fn image(&self) -> String {
        format!("{ADDRESS}:{PORT}/bench/start:1")
    }

    /// Writes the pod's file; see [`layout::pod`].
    ///
    /// # Errors
    /// The disk is full.
    pub(super) fn write_pod(&self, template: bool) -> Result<PathBuf> {
        let file = self.lab.dir().join("start-pod.yaml");
        std::fs::write(&file, layout::pod(&self.image(), template))
            .context("cannot write the pod's file")?;
        Ok(file)
    }

    /// Has the node use the image before it is there.
    ///
    /// # Errors
    /// The registry does not give it.
    pub(super) fn pull(&self) -> Result<()> {
        let pull = ["image", "pull", "--lazy", "--plain-http", "--lease", "0"];
        cmd::output(self.lab.on(NODE).args(pull).arg(self.image())).map(drop)
    }

    /// The shape is known of a pod whose image is there: it is forgotten again.
    fn make_template(&self) -> Result<()> {
        self.pull()?;
        let pod = self.write_pod(true)?;
        cmd::output(self.lab.on(NODE).args(["template", "build"]).arg(pod))?;
        self.forget()
    }

    /// Limits what the registry sends.
    ///
    /// # Errors
    /// The kernel has no token bucket.
    pub(super) fn limit(&self, rate: Option<&str>) -> Result<()> {
        netns::within(&self.lab.client(), || {
            // Nothing is limited at first.
            let _ = cmd::output(&mut cmd::command(
                "tc",
                "qdisc del dev eth0 root".split(' '),
            ));
            let Some(rate) = rate else {
                return Ok(());
            };
            let words = format!("qdisc add dev eth0 root tbf rate {rate} burst 256kb latency 50ms");
            cmd::output(&mut cmd::command("tc", words.split(' '))).map(drop)
        })
    }

    /// Bytes that the registry has sent, with all headers.
    ///
    /// # Errors
    /// The device does not say.
    pub(super) fn sent_bytes(&self) -> Result<u64> {
        let client = self.lab.client();
        let words = ["-n", &client, "-s", "-j", "link", "show", "dev", "eth0"];
        let links: Value = serde_json::from_str(&cmd::output(&mut cmd::command("ip", words))?)?;
        links[0]["stats64"]["tx"]["bytes"]
            .as_u64()
            .context("`ip -s -j link` shows no bytes")
    }

    /// The node does not have the image any more.
    ///
    /// # Errors
    /// Something of it stays.
    pub(super) fn forget(&self) -> Result<()> {
        // A run that failed may have left no pod.
        let _ = cmd::output(
            self.lab
                .on(NODE)
                .args(["stop", "--grace", "0", layout::POD]),
        );
        self.clear(NODE)
    }

    fn clear(&self, node: Node) -> Result<()> {
        let image = self.image();
        if cmd::output(self.lab.on(node).args(["image", "ls"]))?.contains(&image) {
            cmd::output(self.lab.on(node).args(["image", "rm", &image]))?;
        }
        cmd::output(self.lab.on(node).args(["image", "gc"])).map(drop)
    }

    fn wait_for_registry(&self) -> Result<()> {
        let up = netns::within(&self.lab.client(), || {
            Ok(poll_until(COMES_UP_WITHIN, || {
                std::net::TcpStream::connect((ADDRESS, PORT)).is_ok()
            }))
        })?;
        ensure!(
            up,
            "docker-registry does not come up: see {}",
            self.lab.dir().join("registry.out").display()
        );
        Ok(())
    }
}

/// Starts the registry where the client is.
fn registry(lab: &Lab) -> Result<Child> {
    let client = lab.client();
    let words = format!("-n {client} addr add {ADDRESS}/24 dev eth0");
    cmd::output(&mut cmd::command("ip", words.split(' ')))?;
    let dir = lab.dir();
    let config = dir.join("registry.yml");
    let data = serde_json::to_string(&dir.join("registry").to_string_lossy())?;
    let text = format!(
        "version: 0.1
log: {{ level: warn }}
storage:
  filesystem: {{ rootdirectory: {data} }}
http:
  addr: {ADDRESS}:{PORT}
"
    );
    std::fs::write(&config, text).context("cannot write the registry's configuration")?;
    let out = File::create(dir.join("registry.out"))?;
    let mut command = Command::new("docker-registry");
    command
        .arg("serve")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    netns::spawn(&client, &mut command)
}
