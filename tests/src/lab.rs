//! The lab of xtask as a fixture: a pod under traffic on node a, and no trace of it afterwards.

mod leftovers;
mod migration;
mod pods;
mod verbs;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use migrator::api::types::{PodList, PodState};
use xtask::demo_image;
use xtask::lab::{Lab, Node, Owner, Topology};
use xtask::probe::{self, Probe, Record};
use xtask::process::poll_until;
use xtask::project::Project;

pub use pods::{is_whole, pod_yaml, writer_yaml};
pub use verbs::Said;

/// The pod that tests move.
pub const POD: &str = "demo";
/// Its addresses.
pub const POD_IPV4: &str = "10.77.0.10";
/// See [`POD_IPV4`].
pub const POD_IPV6: &str = "fd77::10";
/// Where its echo listens.
pub const ECHO: &str = "10.77.0.10:7000";
/// Packets a second: enough to see every gap, and little enough for emulated guests beside the tests.
pub const RATE: u32 = 1_000;

/// A guest boots in 5 s under emulation, on an idle machine.
const BOOTS_WITHIN: Duration = Duration::from_secs(120);
/// What the service takes to notice and to clean up: a silent link counts as lost after 3 s.
pub const SOON: Duration = Duration::from_secs(30);

/// One lab at a time: its namespaces and addresses have names.
static ONE: Mutex<()> = Mutex::new(());

/// A lab that a test owns.
pub struct TestLab {
    lab: Lab,
    project: Project,
    probe: Option<Probe>,
    passed: bool,
    _one: MutexGuard<'static, ()>,
}

impl TestLab {
    /// Both nodes up, nothing on them.
    ///
    /// # Errors
    /// The lab does not come up, or somebody uses it.
    pub fn up() -> Result<Self> {
        Self::up_as(Topology::Bridge)
    }

    /// All nodes of a topology up, nothing on them.
    ///
    /// # Errors
    /// As [`TestLab::up`].
    pub fn up_as(topology: Topology) -> Result<Self> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let project = Project::discover()?;
        let lab = Lab::new(&project)?.with_topology(topology);
        if lab.state()?.owner == Some(Owner::User)
            && Node::ALL.iter().any(|node| lab.is_running(*node))
        {
            bail!("a lab is up, and a test would replace it: `cargo xtask lab down` takes it down");
        }
        let test = Self {
            lab,
            project,
            probe: None,
            passed: false,
            _one: one,
        };
        // From here on, whatever fails is taken down again.
        test.lab.up(Owner::Test)?;
        Ok(test)
    }

    /// As [`TestLab::up`], with lines added to the end of each node's configuration, which is its `qemu` section.
    ///
    /// # Errors
    /// As [`TestLab::up`].
    pub fn up_with_qemu(lines: &str) -> Result<Self> {
        let test = Self::up()?;
        for node in Node::ALL {
            test.restart(node, || {
                let path = test.lab.node_dir(node).join("config.yaml");
                let config = std::fs::read_to_string(&path)?;
                Ok(std::fs::write(&path, config + lines)?)
            })?;
        }
        Ok(test)
    }

    /// As [`TestLab::up`], with the fast way by XDP: the lab's uplinks are veths, where nobody takes it unasked.
    ///
    /// # Errors
    /// As [`TestLab::up`].
    pub fn up_with_xdp() -> Result<Self> {
        let test = Self::up()?;
        for node in Node::ALL {
            test.restart(node, || {
                let path = test.lab.node_dir(node).join("config.yaml");
                let config = std::fs::read_to_string(&path)?;
                let others = config.lines().filter(|line| !line.starts_with("xdp:"));
                let lines: Vec<&str> = ["xdp: on"].into_iter().chain(others).collect();
                Ok(std::fs::write(&path, lines.join("\n"))?)
            })?;
        }
        Ok(test)
    }

    /// As [`TestLab::up`], with lines added to the top level of each node's configuration.
    ///
    /// # Errors
    /// As [`TestLab::up`].
    pub fn up_with(lines: impl Fn(&Self) -> String) -> Result<Self> {
        let test = Self::up()?;
        let lines = lines(&test);
        for node in Node::ALL {
            test.restart(node, || {
                let path = test.lab.node_dir(node).join("config.yaml");
                let config = std::fs::read_to_string(&path)?;
                Ok(std::fs::write(&path, lines.clone() + "\n" + &config)?)
            })?;
        }
        Ok(test)
    }

    /// Kills a node's service, and starts it again after `meanwhile`.
    ///
    /// # Errors
    /// It does not come up again, or `meanwhile` fails.
    pub fn restart(&self, node: Node, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        self.lab.kill_node(node)?;
        meanwhile()?;
        self.lab.start_node(node)
    }

    /// The pod runs on node a, with the probe on it.
    ///
    /// # Errors
    /// As [`TestLab::up`], or the pod does not answer.
    pub fn with_pod() -> Result<Self> {
        Self::with_pod_as(Topology::Bridge)
    }

    /// As [`TestLab::with_pod`], in a topology.
    ///
    /// # Errors
    /// As [`TestLab::with_pod`].
    pub fn with_pod_as(topology: Topology) -> Result<Self> {
        let mut test = Self::up_as(topology)?;
        test.run_pod()?;
        Ok(test)
    }

    /// Runs the pod on node a, and starts the probe.
    ///
    /// # Errors
    /// It does not answer.
    pub fn run_pod(&mut self) -> Result<()> {
        self.run_pod_of(&pod_yaml(POD, POD_IPV4, POD_IPV6))
    }

    /// As [`TestLab::run_pod`], with a variant of [`pod_yaml`].
    ///
    /// # Errors
    /// It does not answer.
    pub fn run_pod_of(&mut self, yaml: &str) -> Result<()> {
        self.import_demo(Node::A)?;
        self.run(Node::A, yaml, &[])?;
        let echo: SocketAddr = ECHO.parse()?;
        ensure!(
            probe::answers(&self.lab.client(), echo, BOOTS_WITHIN)?,
            "the pod does not answer at {ECHO} within {BOOTS_WITHIN:?}"
        );
        self.start_probe()
    }

    /// Starts a probe; [`TestLab::probe_is_perfect`] ends it.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn start_probe(&mut self) -> Result<()> {
        self.probe = Some(Probe::start(&self.lab.client(), ECHO.parse()?, RATE)?);
        self.answers_on()
    }

    /// Ends the probe; what it has recorded.
    ///
    /// # Errors
    /// No probe runs.
    pub fn stop_probe(&mut self) -> Result<Record> {
        self.probe.take().context("no probe runs")?.stop()
    }

    /// Imports the demo's image.
    ///
    /// # Errors
    /// The node does not take it.
    pub fn import_demo(&self, node: Node) -> Result<()> {
        let image = match std::env::var_os("MIGRATOR_DEMO_IMAGE") {
            Some(layout) => PathBuf::from(layout),
            None => demo_image::ensure(&self.project)?,
        };
        self.import(node, &image, &[])
    }

    /// Imports an image.
    ///
    /// # Errors
    /// The node does not take it.
    pub fn import(&self, node: Node, image: &Path, options: &[&str]) -> Result<()> {
        let image = image.to_str().context("a path that is not UTF-8")?;
        self.succeeds(node, &[&["image", "import", image], options].concat())
            .map(drop)
    }

    /// Runs a pod from its YAML.
    ///
    /// # Errors
    /// It does not start.
    pub fn run(&self, node: Node, yaml: &str, options: &[&str]) -> Result<()> {
        let file = self.lab.dir().join("test-pod.yaml");
        std::fs::write(&file, yaml).with_context(|| format!("cannot write {}", file.display()))?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        self.succeeds(node, &[&["run", file], options].concat())
            .map(drop)
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Where things are.
    pub fn project(&self) -> &Project {
        &self.project
    }

    /// A node's state folder.
    pub fn state(&self, node: Node) -> PathBuf {
        self.lab.node_dir(node).join("state")
    }

    /// The state of a pod of this name on this node, if it is there.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn pod_state(&self, node: Node) -> Result<Option<PodState>> {
        let list: PodList =
            serde_json::from_str(&self.succeeds(node, &["--output", "json", "ps"])?)?;
        Ok(list
            .pods
            .iter()
            .find(|pod| pod.name == POD)
            .map(|pod| pod.state))
    }

    /// Waits until `ps` of this node shows the pod as running.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn runs_on(&self, node: Node) -> Result<()> {
        let mut last = None;
        let runs = poll_until(SOON, || {
            last = self.pod_state(node).ok().flatten();
            last == Some(PodState::Running)
        });
        ensure!(
            runs,
            "the pod does not run on node {}: {last:?}",
            node.name()
        );
        Ok(())
    }

    /// Waits until the guest has answered a fifth of a second's packets more than until now.
    ///
    /// # Errors
    /// It does not answer.
    pub fn answers_on(&self) -> Result<()> {
        let probe = self.probe.as_ref().context("no probe runs")?;
        let enough = probe.answered() + u64::from(RATE) / 5;
        ensure!(
            poll_until(SOON, || probe.answered() >= enough),
            "the guest does not answer any more"
        );
        Ok(())
    }

    /// `exec` in the pod works, there.
    ///
    /// # Errors
    /// It does not.
    pub fn exec_works(&self, node: Node) -> Result<()> {
        let said = self.succeeds(node, &["exec", POD, "--", "/bin/echo", "still here"])?;
        ensure!(said == "still here\n", "exec prints {said:?}");
        Ok(())
    }

    /// The pod's second container counts: no number may be missing from its log, and none doubled. Returns the last.
    ///
    /// # Errors
    /// The log is not whole.
    pub fn log_is_whole(&self, node: Node) -> Result<u64> {
        let last = self.counted(node)?;
        ensure!(last > 0, "the log is empty");
        Ok(last)
    }

    fn counted(&self, node: Node) -> Result<u64> {
        let text = self.succeeds(node, &["logs", POD, "counter"])?;
        let mut last = 0;
        for line in text.lines() {
            let expected = format!("tick {}", last + 1);
            ensure!(
                line == expected,
                "the log says `{line}` where `{expected}` belongs, of {} lines",
                text.lines().count()
            );
            last += 1;
        }
        Ok(last)
    }

    /// Waits until the counter's log goes on past `floor`, whole.
    ///
    /// # Errors
    /// It does not.
    pub fn log_goes_on(&self, node: Node, floor: u64) -> Result<u64> {
        let mut last = Ok(0);
        poll_until(SOON, || {
            last = self.counted(node);
            last.as_ref().map_or(true, |last| *last > floor)
        });
        let last = last?;
        ensure!(last > floor, "the log ends at {last}");
        Ok(last)
    }

    /// The probe, stopped, with every packet answered once and in order.
    ///
    /// # Errors
    /// A packet was lost, doubled or out of order.
    pub fn probe_is_perfect(&mut self) -> Result<()> {
        self.answers_on()?;
        let record = self.stop_probe()?;
        let summary = record.summary();
        ensure!(
            (summary.lost, summary.duplicated, summary.reordered) == (0, 0, 0)
                && summary.received > 0,
            "{summary:?}; first without an answer: {:?}",
            record.unanswered()
        );
        ensure!(record.refused.is_none(), "{:?}", record.refused);
        Ok(())
    }

    /// The end of a test that passed: the probe is perfect, and the lab goes without a trace.
    ///
    /// # Errors
    /// One of them is not so.
    pub fn end(mut self) -> Result<()> {
        if self.probe.is_some() {
            self.probe_is_perfect()?;
        }
        self.passed = true;
        self.lab.down()
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        if let Some(probe) = self.probe.take() {
            match probe.stop() {
                Ok(record) => eprintln!("the probe of this test: {:?}", record.summary()),
                Err(error) => eprintln!("the probe of this test: {error:#}"),
            }
        }
        if !self.passed {
            for node in self.lab.topology().nodes() {
                let node = *node;
                tail(&self.lab.log(node));
                let kept = self
                    .project
                    .target
                    .join(format!("failed-test-{}.log", node.name()));
                // The end is shown above.
                let _ = std::fs::copy(self.lab.log(node), kept);
            }
        }
        if let Err(error) = self.lab.down() {
            eprintln!("{error:#}");
        }
    }
}

/// Prints the end of a log, for whoever reads why a test failed.
fn tail(log: &Path) {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(40);
    eprintln!("the end of {}:", log.display());
    for line in lines.get(from..).unwrap_or_default() {
        eprintln!("    {line}");
    }
}
