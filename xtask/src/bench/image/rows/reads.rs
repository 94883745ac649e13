//! How fast QEMU reads and writes a disk that the block server serves, against its own raw driver on the same file: `qemu-img bench`,
//! which is QEMU's block layer without a guest.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::cmd;
use crate::process::poll_until;
use crate::project::Project;

/// The disk: larger than the processor's caches, and small enough to stay in the page cache.
const SIZE: u64 = 512 << 20;
/// A run may take so long on a busy machine.
const RUN_WITHIN: Duration = Duration::from_secs(120);
/// For random places: an odd number of blocks of 4 KiB, so that all of the disk's are met, in an order without neighbours.
const STRIDE: u64 = 12_345 * 4096;

/// One case.
struct Kind {
    name: &'static str,
    /// Bytes of a request.
    bytes: u64,
    /// Requests under way.
    depth: u32,
    /// Requests of a run.
    count: u64,
    /// From the place of one request to that of the next.
    step: u64,
    writes: bool,
}

const KINDS: [Kind; 9] = [
    kind("read-1m-1", 1 << 20, 1, 3_000),
    kind("read-1m-8", 1 << 20, 8, 4_000),
    kind("read-64k-1", 64 << 10, 1, 20_000),
    kind("read-64k-8", 64 << 10, 8, 40_000),
    random(kind("read-random-4k-1", 4 << 10, 1, 30_000)),
    random(kind("read-random-4k-16", 4 << 10, 16, 100_000)),
    writes(kind("write-1m-8", 1 << 20, 8, 1_500)),
    writes(kind("write-64k-8", 64 << 10, 8, 20_000)),
    random(writes(kind("write-random-4k-16", 4 << 10, 16, 60_000))),
];

/// What a quick run has.
const QUICK: [&str; 3] = ["read-64k-8", "read-random-4k-16", "write-random-4k-16"];

const fn kind(name: &'static str, bytes: u64, depth: u32, count: u64) -> Kind {
    Kind {
        name,
        bytes,
        depth,
        count,
        step: bytes,
        writes: false,
    }
}

const fn random(kind: Kind) -> Kind {
    Kind {
        step: STRIDE,
        ..kind
    }
}

const fn writes(kind: Kind) -> Kind {
    Kind {
        writes: true,
        ..kind
    }
}

impl Kind {
    fn case(&self) -> String {
        format!("disk-{}", self.name)
    }

    /// Writes have none: as near as can be.
    fn aims(&self) -> &'static [Aim] {
        match self.writes {
            true => &[],
            false => &[Aim::RatioAtLeast(0.8)],
        }
    }
}

pub(super) fn cases(quick: bool) -> Vec<String> {
    let wanted = |kind: &&Kind| !quick || QUICK.contains(&kind.name);
    KINDS.iter().filter(wanted).map(Kind::case).collect()
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    let served = Served::start(bench.project)?;
    let (raw, nbd) = ("QEMU's raw file driver", "qemu-nbd");
    for kind in KINDS.iter().filter(|kind| wanted.contains(&kind.case())) {
        let (mut ours, mut peer) = (Samples::default(), Samples::default());
        let mut other = Samples::default();
        for _ in 0..bench.plan.runs {
            ours.add(told("ours", measure(kind, &served.over_nbd(OURS))));
            peer.add(told(raw, measure(kind, &served.raw())));
            other.add(told(nbd, measure(kind, &served.over_nbd(THEIRS))));
        }
        // What the protocol costs is in both; what our server costs is not in the second.
        for (against, aims, peer) in [(raw, kind.aims(), &peer), (nbd, &[], &other)] {
            let rate = Metric {
                name: "rate",
                unit: "MB/s",
                aims,
            };
            let records = records(&kind.case(), against, &[rate], &ours, peer);
            bench.records.extend(records);
        }
    }
    Ok(())
}

/// One run of QEMU's requests.
fn measure(kind: &Kind, options: &str) -> Result<Run> {
    let mut bench = Command::new("qemu-img");
    // The cache mode of a node in our command line, which names none: through the page cache.
    bench.args(["bench", "-t", "writeback", "--image-opts"]);
    for (option, number) in [
        ("-d", kind.depth.into()),
        ("-c", kind.count),
        ("-s", kind.bytes),
        ("-S", kind.step),
    ] {
        bench.args([option, &number.to_string()]);
    }
    if kind.writes {
        bench.arg("-w");
    }
    bench.arg(options);
    let said = cmd::bounded(&mut bench, RUN_WITHIN)
        .context("cannot run qemu-img: `cargo xtask setup` installs qemu-utils")?;
    ensure!(said.code == Some(0), "qemu-img bench: {said:?}");
    let seconds = seconds(&said.out).with_context(|| format!("qemu-img says {}", said.out))?;
    let megabytes = (kind.bytes * kind.count) as f64 / 1e6;
    Ok(vec![("rate", megabytes / seconds)])
}

/// From `Run completed in 1.234 seconds.`
fn seconds(said: &str) -> Option<f64> {
    let (_, rest) = said.split_once("Run completed in ")?;
    let (seconds, _) = rest.split_once(' ')?;
    seconds.parse().ok().filter(|seconds| *seconds > 0.0)
}

/// The disk, our server of it, a process of its own, as the service is, and QEMU's.
struct Served {
    servers: Vec<Child>,
    dir: PathBuf,
}

/// Sockets.
const OURS: &str = "socket";
const THEIRS: &str = "qemu-nbd";
/// A server of QEMU's listens within this.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);

const PROGRAM: &str = "disk-serve";

impl Served {
    fn start(project: &Project) -> Result<Self> {
        let words = ["build", "--quiet", "-p", "migrator-tests", "--bin", PROGRAM];
        cmd::run(&mut cmd::cargo(project, words))?;
        let dir = project.target.join("bench-disk");
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        fill(&dir.join("disk"))?;
        let mut command = Command::new(project.target.join("debug").join(PROGRAM));
        command.arg(dir.join("disk")).arg(dir.join("socket"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let server = command
            .spawn()
            .with_context(|| format!("cannot start `{}`", cmd::show(&command)))?;
        let mut served = Self {
            servers: vec![server],
            dir,
        };
        let said = served.servers[0].stdout.take();
        let mut line = String::new();
        BufReader::new(said.context("it says nothing")?).read_line(&mut line)?;
        ensure!(line == "serving\n", "{PROGRAM} does not serve: {line}");
        served.start_qemus()?;
        Ok(served)
    }

    fn start_qemus(&mut self) -> Result<()> {
        let socket = self.dir.join(THEIRS);
        // Of a benchmark that was killed.
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=8", "--format=raw"]);
        command.args(["--aio=threads", "--cache=writeback", "--discard=unmap"]);
        command
            .arg("--socket")
            .arg(&socket)
            .arg(self.dir.join("disk"));
        let server = command
            .spawn()
            .context("cannot start qemu-nbd: `cargo xtask setup` installs qemu-utils")?;
        self.servers.push(server);
        ensure!(
            poll_until(LISTENS_WITHIN, || socket.exists()),
            "qemu-nbd does not listen at {}",
            socket.display()
        );
        Ok(())
    }

    fn over_nbd(&self, socket: &str) -> String {
        let socket = self.dir.join(socket);
        let socket = socket.display();
        format!("driver=nbd,server.type=unix,server.path={socket}")
    }

    fn raw(&self) -> String {
        let file = self.dir.join("disk");
        let file = file.display();
        format!("driver=raw,file.driver=file,file.filename={file}")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Neither can fail for a child that nobody else waits for; a folder that stays is in the build's.
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Without holes, and all of it in the page cache.
fn fill(path: &Path) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let mut file = File::create(path).with_context(failed)?;
    let piece = vec![0x5a; 1 << 20];
    for _ in 0..SIZE >> 20 {
        file.write_all(&piece).with_context(failed)?;
    }
    file.sync_all().with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_run_is_read() {
        let said = "Sending 30 read requests, 65536 bytes each\nRun completed in 0.044 seconds.\n";
        assert_eq!(seconds(said), Some(0.044));
        assert_eq!(seconds("Run completed in 0.000 seconds."), None);
        assert_eq!(seconds("Failed"), None);
    }

    #[test]
    fn random_places_are_all_of_the_disk() {
        assert!((SIZE / 4096).is_power_of_two() && (STRIDE / 4096) % 2 == 1);
        let quick = cases(true);
        assert_eq!(quick.len(), QUICK.len());
        assert!(quick.iter().all(|case| cases(false).contains(case)));
    }
}
