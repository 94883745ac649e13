//! The load's file: written at a steady rate, or read as fast as it goes, always past the guest's page cache.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use super::{LAG, TICK, next};

/// Bytes of a write.
const BLOCK: usize = 16 << 10;
/// Bytes of the largest read.
pub(super) const LARGEST: usize = 1 << 20;
/// What O_DIRECT wants memory, places and lengths to be aligned to, at most.
const ALIGNED: usize = 4096;
/// `O_DIRECT` of asm-generic/fcntl.h, which x86 and RISC-V have.
const O_DIRECT: i32 = 0o40000;

/// The file, and memory for its content: noise, until something is read.
pub(super) struct Disk {
    file: File,
    size: u64,
    memory: Vec<u8>,
    /// Where the next read begins that follows the one before.
    at: u64,
    random: u64,
}

impl Disk {
    /// Makes the file, full of noise.
    pub(super) fn filled(path: &str, mib: u64) -> io::Result<Disk> {
        let mut state = 0x2545_f491_4f6c_dd1d;
        let mut memory = vec![0; LARGEST + ALIGNED];
        let mut file = File::create(path)?;
        for _ in 0..mib {
            for word in memory.chunks_exact_mut(8) {
                word.copy_from_slice(&next(&mut state).to_ne_bytes());
            }
            file.write_all(&memory[..1 << 20])?;
        }
        file.sync_all()?;
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(O_DIRECT)
            .open(path)?;
        Ok(Disk {
            file,
            size: mib << 20,
            memory,
            at: 0,
            random: state,
        })
    }

    /// Writes so many bytes a second at random places, as long as `same`; `done` hears of each write.
    pub(super) fn write(
        &mut self,
        bytes_per_s: u64,
        same: impl Fn() -> bool,
        done: impl Fn(u64),
    ) -> io::Result<()> {
        let a_block = Duration::from_secs_f64(BLOCK as f64 / bytes_per_s.max(1) as f64);
        let mut due = Instant::now();
        while same() {
            let now = Instant::now();
            due = due.max(now.checked_sub(LAG).unwrap_or(now));
            while due <= now && same() {
                let offset = self.any_place(BLOCK);
                let number = self.random.to_ne_bytes();
                let from = self.memory.as_ptr().align_offset(ALIGNED);
                let block = &mut self.memory[from..from + BLOCK];
                block[..8].copy_from_slice(&number);
                self.file.write_all_at(block, offset)?;
                done(BLOCK as u64);
                due += a_block;
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    /// Reads `bytes` at a time, one after the other or at random places, as fast as it goes.
    pub(super) fn read(
        &mut self,
        bytes: usize,
        jumps: bool,
        same: impl Fn() -> bool,
        done: impl Fn(u64),
    ) -> io::Result<()> {
        while same() {
            let offset = match jumps {
                true => self.any_place(bytes),
                false => self.at,
            };
            self.at = match offset + 2 * bytes as u64 <= self.size {
                true => offset + bytes as u64,
                false => 0,
            };
            let from = self.memory.as_ptr().align_offset(ALIGNED);
            let into = &mut self.memory[from..from + bytes];
            self.file.read_exact_at(into, offset)?;
            done(bytes as u64);
        }
        Ok(())
    }

    fn any_place(&mut self, bytes: usize) -> u64 {
        next(&mut self.random) % (self.size / bytes as u64) * bytes as u64
    }
}
