//! The block server with clients that this project did not write. Needs qemu-io, qemu-img (qemu-utils), mke2fs and e2fsck (e2fsprogs).

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migrator::block::Disk;
use migrator::block::mkfs::mkfs;
use migrator::block::nbd::Server;
use tempfile::TempDir;
use xtask::cmd;

const SIZE: u64 = 64 << 20;
/// For one command of a client, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

struct Served {
    dir: TempDir,
    disk: Arc<Disk>,
    server: Option<Server>,
}

impl Served {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let disk = Arc::new(Disk::create(&dir.path().join("disk"), SIZE)?);
        let mut served = Self {
            dir,
            disk,
            server: None,
        };
        served.serve()?;
        Ok(served)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// As a service does that starts again: another disk on the same file.
    fn serve(&mut self) -> Result<()> {
        self.server = None;
        self.disk = Arc::new(Disk::open(&self.dir.path().join("disk"))?);
        self.server = Some(Server::start(Arc::clone(&self.disk), &self.socket())?);
        Ok(())
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    fn qemu_io(&self, commands: &[&str]) -> Result<()> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]);
        for text in commands {
            command.args(["-c", text]);
        }
        let said = cmd::bounded(command.arg(self.uri()), SOON)?;
        ensure!(said.code == Some(0), "{said:?}");
        ensure!(!said.out.contains("verification failed"), "{said:?}");
        Ok(())
    }
}

#[test]
fn qemus_tools_read_what_they_wrote_zeroed_and_discarded() -> Result<()> {
    let served = Served::new()?;
    served.qemu_io(&[
        "write -P 17 0 8M",
        "write -f -P 34 8M 3k",
        "write -z 1M 64k",
        "write -z -u 2M 64k",
        "discard 4M 1M",
        "flush",
        "aio_write -P 51 16M 1M",
        "aio_write -P 68 18M 1M",
        "aio_flush",
        "read -P 17 0 1M",
        "read -P 0 1M 64k",
        "read -P 0 2M 64k",
        "read -P 0 4M 1M",
        "read -P 17 5M 1M",
        "read -P 34 8M 3k",
        "read -P 51 16M 1M",
        "read -P 68 18M 1M",
        "read -P 0 63M 1M",
    ])?;
    let took = served.disk.allocated_bytes()?;
    ensure!(took < 11 << 20, "{took} bytes: nothing was given back");
    let mut compare = Command::new("qemu-img");
    let file = served.disk.path();
    compare.args(["compare", "-f", "raw", "-F", "raw"]);
    let said = cmd::bounded(compare.arg(served.uri()).arg(file), SOON)?;
    ensure!(said.code == Some(0), "{said:?}");
    Ok(())
}

#[test]
fn a_new_file_system_is_clean_and_takes_little_room() -> Result<()> {
    let served = Served::new()?;
    mkfs(served.disk.path())?;
    let took = served.disk.allocated_bytes()?;
    ensure!(took < 8 << 20, "{took} bytes for an empty file system");
    let mut fsck = Command::new("/usr/sbin/e2fsck");
    let said = cmd::bounded(fsck.arg("-fn").arg(served.disk.path()), SOON)?;
    ensure!(said.code == Some(0), "{said:?}");
    Ok(())
}

/// A qemu-io that is told one command after the other, with the options of a guest's disk.
struct Talking {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Talking {
    fn start(served: &Served) -> Result<Self> {
        let node = serde_json::json!({
            "driver": "raw",
            "file": {
                "driver": "nbd",
                "server": { "type": "unix", "path": served.socket() },
                "reconnect-delay": 600,
            },
        });
        let mut child = Command::new("qemu-io")
            .arg(format!("json:{node}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("qemu-io (qemu-utils)")?;
        let input = child.stdin.take().context("no input")?;
        let output = child.stdout.take().context("no output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.for_each(|line| drop(sender.send(line)));
        });
        Ok(Self {
            child,
            input,
            lines,
        })
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        writeln!(self.input, "{command}")?;
        Ok(self.input.flush()?)
    }

    /// Waits for a line with this text; an error that comes before is one.
    fn hear(&self, text: &str) -> Result<()> {
        loop {
            let line = self.lines.recv_timeout(SOON);
            let line = line.with_context(|| format!("it never says `{text}`"))?;
            ensure!(!line.contains("failed"), "it says `{line}`");
            if line.contains(text) {
                return Ok(());
            }
        }
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        // It ends by itself where the test passed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_client_waits_for_a_server_that_is_gone_and_loses_nothing() -> Result<()> {
    let mut served = Served::new()?;
    let mut client = Talking::start(&served)?;
    client.tell("write -P 1 0 1M")?;
    client.hear("wrote 1048576/1048576")?;
    served.server = None;
    client.tell("write -P 2 1M 1M")?;
    served.serve()?;
    client.hear("wrote 1048576/1048576")?;
    for command in ["read -P 1 0 1M", "read -P 2 1M 1M"] {
        client.tell(command)?;
        client.hear("read 1048576/1048576")?;
    }
    Ok(())
}
