//! Finding guest RAM in a VMM's address space. Pure: the text of `/proc/PID/maps` comes in.

use nix::sys::stat::{major, minor};

/// A stretch of a process's address space that maps guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address in the process.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Byte offset in the memfd of `start`.
    pub offset: u64,
}

/// Every writable shared mapping of the file with this device and inode, ordered by address.
///
/// `maps` is the text of `/proc/PID/maps`, proc_pid_maps(5). Lines that do not parse are passed
/// over: they cannot be ours.
pub fn find_mappings(maps: &str, (device, inode): (u64, u64)) -> Vec<Mapping> {
    maps.lines()
        .filter_map(|line| parse(line, device, inode))
        .collect()
}

fn parse(line: &str, device: u64, inode: u64) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = fields.next()?;
    let (dev_major, dev_minor) = fields.next()?.split_once(':')?;
    let same = permissions.starts_with("rw")
        && permissions.ends_with('s')
        && u64::from_str_radix(dev_major, 16).ok()? == major(device)
        && u64::from_str_radix(dev_minor, 16).ok()? == minor(device)
        && fields.next()?.parse::<u64>().ok()? == inode;
    if !same {
        return None;
    }
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        offset: u64::from_str_radix(offset, 16).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0a00000-55d0c0e00000 r-xp 00000000 fe:00 1234 /usr/bin/qemu-system-x86_64
7f1200000000-7f1210000000 rw-s 00000000 00:01 1031 /memfd:ram with spaces (deleted)
7f1210000000-7f1220000000 rw-s 10000000 00:01 1031 /memfd:ram with spaces (deleted)
7f1220000000-7f1220001000 r--s 00000000 00:01 1031 /memfd:ram with spaces (deleted)
7f1230000000-7f1240000000 rw-s 00000000 00:01 1032 /memfd:other (deleted)
7f1250000000-7f1260000000 rw-p 00000000 00:00 0
garbage
";

    #[test]
    fn only_writable_shared_mappings_of_the_inode_count() {
        let found = find_mappings(MAPS, (1, 1031));
        assert_eq!(
            found,
            [
                Mapping {
                    start: 0x7f12_0000_0000,
                    end: 0x7f12_1000_0000,
                    offset: 0
                },
                Mapping {
                    start: 0x7f12_1000_0000,
                    end: 0x7f12_2000_0000,
                    offset: 0x1000_0000
                },
            ]
        );
        assert_eq!(find_mappings(MAPS, (2, 1031)), []);
        assert_eq!(find_mappings("", (1, 1031)), []);
    }
}
