//! QEMU's own NBD client as the guest: `qemu-io`, which writes one numbered record after the other, each flushed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use migrator::block::DiskError;
use xtask::process::poll_until;

/// Bytes of a record.
pub const RECORD: u64 = 4096;
/// What some records take on a busy machine.
const WRITES_WITHIN: Duration = Duration::from_secs(60);

/// What was written where: the byte that fills each record.
#[derive(Debug)]
pub struct Records {
    offsets: Vec<u64>,
    /// By offset.
    acknowledged: BTreeMap<u64, u8>,
    /// May be there or not, whole or in part.
    under_way: Option<u64>,
    count: u64,
}

impl Records {
    pub fn new(offsets: Vec<u64>) -> Self {
        Self {
            offsets,
            acknowledged: BTreeMap::new(),
            under_way: None,
            count: 0,
        }
    }

    /// The next one: scattered, and in time over an older one.
    fn next(&mut self) -> (u64, u8) {
        let at = (self.count * 7919 % self.offsets.len() as u64) as usize;
        let byte = (self.count % 251 + 1) as u8;
        let offset = self.offsets[at];
        self.under_way = Some(offset);
        (offset, byte)
    }

    fn written(&mut self, offset: u64, byte: u8) {
        self.acknowledged.insert(offset, byte);
        self.under_way = None;
        self.count += 1;
    }

    /// Everything that was acknowledged is where it was written.
    pub fn compare(&self, read: impl Fn(u64, &mut [u8]) -> Result<(), DiskError>) -> Result<()> {
        ensure!(!self.acknowledged.is_empty(), "nothing was written");
        let mut content = vec![0; RECORD as usize];
        for (offset, byte) in &self.acknowledged {
            read(*offset, &mut content)?;
            let found = content.iter().find(|found| *found != byte);
            if self.under_way != Some(*offset)
                && let Some(found) = found
            {
                bail!("{found} is at {offset}, where {byte} was written and acknowledged");
            }
        }
        Ok(())
    }
}

/// Writes until it is told to end.
pub struct Writer {
    qemu: Child,
    shared: Arc<Mutex<Shared>>,
    driver: JoinHandle<Result<()>>,
}

#[derive(Debug)]
struct Shared {
    records: Records,
    end: bool,
}

impl Writer {
    pub fn start(socket: &Path, records: Records) -> Result<Self> {
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let mut qemu = Command::new("qemu-io")
            .args(["-f", "raw", "-t", "none", &uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start qemu-io: `cargo xtask setup` installs qemu-utils")?;
        let to = qemu.stdin.take().context("no standard input")?;
        let from = qemu.stdout.take().context("no standard output")?;
        let end = false;
        let shared = Arc::new(Mutex::new(Shared { records, end }));
        let driver = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || drive(&shared, to, BufReader::new(from)))
        };
        Ok(Self {
            qemu,
            shared,
            driver,
        })
    }

    /// Waits until it has written so many more.
    pub fn has_written(&mut self, more: u64) -> Result<()> {
        let count = || lock(&self.shared).records.count;
        let enough = count() + more;
        let written = poll_until(WRITES_WITHIN, || count() >= enough);
        ensure!(written, "only {} of {enough} are written", count());
        Ok(())
    }

    /// Ends when the last write is answered.
    pub fn end(mut self) -> Result<Records> {
        lock(&self.shared).end = true;
        let ended = self.qemu.wait()?;
        ensure!(ended.success(), "qemu-io ended with {ended}");
        self.records()
    }

    /// The power fails.
    pub fn cut(mut self) -> Result<Records> {
        self.qemu.kill()?;
        self.qemu.wait()?;
        lock(&self.shared).end = true;
        self.records()
    }

    fn records(self) -> Result<Records> {
        // What it ended with in a cut is that its program is gone.
        let driven = self.driver.join();
        driven.map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        let shared = Arc::into_inner(self.shared).context("somebody still writes")?;
        let shared = shared.into_inner();
        Ok(shared.unwrap_or_else(PoisonError::into_inner).records)
    }
}

/// One record after the other. Returns without an error when the program is gone.
fn drive(
    shared: &Mutex<Shared>,
    mut to: ChildStdin,
    mut from: BufReader<std::process::ChildStdout>,
) -> Result<()> {
    loop {
        let (offset, byte) = {
            let mut shared = lock(shared);
            if shared.end {
                return Ok(());
            }
            shared.records.next()
        };
        // A write with FUA is durable when it is answered.
        if writeln!(to, "write -f -P {byte} {offset} {RECORD}").is_err() {
            return Ok(());
        }
        let mut answer = String::new();
        while !answer.contains("wrote ") {
            answer.clear();
            if from.read_line(&mut answer)? == 0 {
                return Ok(());
            }
            ensure!(!answer.contains("rror"), "qemu-io says {answer}");
        }
        lock(shared).records.written(offset, byte);
    }
}

fn lock(shared: &Mutex<Shared>) -> std::sync::MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
