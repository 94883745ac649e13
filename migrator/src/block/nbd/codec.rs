//! The protocol's messages as bytes. Pure. Numbers are big endian; names and values are those of the specification.

use crate::block::GRANULE;

/// `NBDMAGIC`, which the server begins with.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: follows it, and begins each option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// `NBD_FLAG_FIXED_NEWSTYLE`.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
/// `NBD_FLAG_NO_ZEROES`.
pub(super) const NO_ZEROES: u16 = 1 << 1;

/// `NBD_FLAG_HAS_FLAGS`, `SEND_FLUSH`, `SEND_FUA`, `SEND_TRIM`, `SEND_WRITE_ZEROES`, `CAN_MULTI_CONN`.
const WRITABLE_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;
/// `NBD_FLAG_HAS_FLAGS`, `CAN_MULTI_CONN`. Not `READ_ONLY`: QEMU tells a guest that a disk's size has changed only of one that could be
/// written, and a guest from a template has to be told. Writes are refused.
const READ_ONLY_FLAGS: u16 = 1 | 1 << 8;

/// What a client is told of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// In bytes.
    pub(super) size: u64,
    pub(super) read_only: bool,
}

impl Facts {
    /// The transmission flags.
    pub(super) fn flags(self) -> u16 {
        match self.read_only {
            true => READ_ONLY_FLAGS,
            false => WRITABLE_FLAGS,
        }
    }
}

/// Longest data of an option: a name of at most 4096 bytes, and what is around it.
pub(super) const MAX_OPTION: u32 = 8 << 10;
/// Longest payload of a read or a write. Clients are told; QEMU splits what is longer.
pub(super) const MAX_PAYLOAD: u32 = 4 << 20;

/// Bytes of a request's header.
pub(super) const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply's header.
pub(super) const REPLY_LEN: usize = 16;
/// Bytes of an option's header.
pub(super) const OPTION_LEN: usize = 16;

/// `NBD_CMD_FLAG_FUA`.
const FUA: u16 = 1;
/// `NBD_CMD_FLAG_NO_HOLE`.
const NO_HOLE: u16 = 1 << 1;

/// An option of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OptionKind {
    /// `NBD_OPT_EXPORT_NAME`: begin, without an answer to an error.
    ExportName,
    /// `NBD_OPT_ABORT`.
    Abort,
    /// `NBD_OPT_LIST`.
    List,
    /// `NBD_OPT_INFO`.
    Info,
    /// `NBD_OPT_GO`: begin.
    Go,
    /// Any other.
    Other,
}

/// Types of an option's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum OptionReply {
    Ack = 1,
    Server = 2,
    Info = 3,
    Unsupported = 1 << 31 | 1,
    Invalid = 1 << 31 | 3,
    UnknownExport = 1 << 31 | 6,
    TooBig = 1 << 31 | 9,
}

/// The header of an option: its number, what it is, and the length of its data.
pub(super) fn option(header: &[u8; OPTION_LEN]) -> Option<(u32, OptionKind, u32)> {
    if u64::from_be_bytes(part(header, 0)) != OPTION_MAGIC {
        return None;
    }
    let number = u32::from_be_bytes(part(header, 8));
    let kind = match number {
        1 => OptionKind::ExportName,
        2 => OptionKind::Abort,
        3 => OptionKind::List,
        6 => OptionKind::Info,
        7 => OptionKind::Go,
        _ => OptionKind::Other,
    };
    Some((number, kind, u32::from_be_bytes(part(header, 12))))
}

/// The name in the data of `NBD_OPT_INFO` and `NBD_OPT_GO`; `None` if the lengths in it do not add up.
pub(super) fn export_name(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
    let (name, rest) = rest.split_at_checked(len)?;
    let (count, requests) = rest.split_first_chunk::<2>()?;
    let fits = requests.len() == usize::from(u16::from_be_bytes(*count)) * 2;
    fits.then_some(name)
}

/// A reply to the option with this number.
pub(super) fn option_reply(number: u32, reply: OptionReply, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((reply as u32).to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// `NBD_INFO_EXPORT`.
pub(super) fn info_export(facts: Facts) -> Vec<u8> {
    let mut bytes = 0_u16.to_be_bytes().to_vec();
    bytes.extend(facts.size.to_be_bytes());
    bytes.extend(facts.flags().to_be_bytes());
    bytes
}

/// `NBD_INFO_BLOCK_SIZE`: any byte may be written, 4 KiB is better, and this is the most at once.
pub(super) fn info_block_size() -> Vec<u8> {
    let mut bytes = 3_u16.to_be_bytes().to_vec();
    for size in [1_u32, 4096, MAX_PAYLOAD] {
        bytes.extend(size.to_be_bytes());
    }
    bytes
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write {
        fua: bool,
    },
    Disconnect,
    Flush,
    Trim {
        fua: bool,
    },
    WriteZeroes {
        fua: bool,
        no_hole: bool,
    },
    /// To be answered with `EINVAL`.
    Unknown,
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// Parses a request's header; `None` if it is none.
pub(super) fn request(header: &[u8; REQUEST_LEN]) -> Option<Request> {
    if u32::from_be_bytes(part(header, 0)) != REQUEST_MAGIC {
        return None;
    }
    let flags = u16::from_be_bytes(part(header, 4));
    let only = |allowed: u16| flags & !allowed == 0;
    let fua = flags & FUA != 0;
    let no_hole = flags & NO_HOLE != 0;
    // Clients may set FUA on every command.
    let command = match u16::from_be_bytes(part(header, 6)) {
        0 if only(FUA) => Command::Read,
        // Its payload follows in any case.
        1 => Command::Write { fua },
        2 => Command::Disconnect,
        3 if only(FUA) => Command::Flush,
        4 if only(FUA) => Command::Trim { fua },
        6 if only(FUA | NO_HOLE) => Command::WriteZeroes { fua, no_hole },
        _ => Command::Unknown,
    };
    Some(Request {
        command,
        cookie: u64::from_be_bytes(part(header, 8)),
        offset: u64::from_be_bytes(part(header, 16)),
        len: u32::from_be_bytes(part(header, 24)),
    })
}

/// The header of a simple reply; `error` is 0 or one of [`error`]'s.
pub(super) fn reply(cookie: u64, error: u32) -> [u8; REPLY_LEN] {
    let mut bytes = [0; REPLY_LEN];
    bytes[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Errors that the protocol has, by the numbers of Linux.
pub(super) mod error {
    pub(crate) const EPERM: u32 = 1;
    pub(crate) const EIO: u32 = 5;
    pub(crate) const EINVAL: u32 = 22;
    pub(crate) const ENOSPC: u32 = 28;
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

// A granule fits a request.
const _: () = assert!(GRANULE <= MAX_PAYLOAD as u64);

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(flags: u16, kind: u16, offset: u64, len: u32) -> [u8; REQUEST_LEN] {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.try_into().unwrap()
    }

    #[test]
    fn commands_are_known_by_number_and_flags() {
        let command = |flags, kind| request(&bytes(flags, kind, 4096, 512)).unwrap().command;
        assert_eq!(command(0, 0), Command::Read);
        assert_eq!(command(4, 0), Command::Unknown);
        assert_eq!(command(1, 1), Command::Write { fua: true });
        assert_eq!(command(0, 3), Command::Flush);
        assert_eq!(command(0, 4), Command::Trim { fua: false });
        let zeroes = Command::WriteZeroes {
            fua: true,
            no_hole: true,
        };
        assert_eq!(command(3, 6), zeroes);
        assert_eq!(command(16, 6), Command::Unknown);
        assert_eq!(command(0, 7), Command::Unknown);
        let whole = request(&bytes(0, 0, 4096, 512)).unwrap();
        assert_eq!((whole.cookie, whole.offset, whole.len), (7, 4096, 512));
        let mut wrong = bytes(0, 0, 0, 0);
        wrong[0] ^= 1;
        assert_eq!(request(&wrong), None);
    }

    #[test]
    fn an_export_name_has_exactly_its_length() {
        let data = |len: u32, name: &[u8], count: u16, rest: &[u8]| {
            let mut data = len.to_be_bytes().to_vec();
            data.extend(name);
            data.extend(count.to_be_bytes());
            data.extend(rest);
            data
        };
        assert_eq!(export_name(&data(0, b"", 0, b"")), Some(&b""[..]));
        assert_eq!(export_name(&data(2, b"ab", 1, &[0, 3])), Some(&b"ab"[..]));
        for wrong in [
            data(3, b"ab", 0, b""),
            data(u32::MAX, b"ab", 0, b""),
            data(2, b"ab", 2, &[0, 3]),
            data(2, b"ab", 0, &[0]),
            vec![0, 0, 0],
        ] {
            assert_eq!(export_name(&wrong), None);
        }
    }

    #[test]
    fn replies_are_those_of_the_specification() {
        assert_eq!(
            reply(0x0102, error::ENOSPC),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 1, 2]
        );
        assert_eq!(
            option_reply(7, OptionReply::Invalid, b"x"),
            [
                0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 7, 0x80, 0, 0, 3, 0, 0, 0, 1, b'x'
            ]
        );
        let facts = |read_only| Facts {
            size: 1 << 20,
            read_only,
        };
        assert_eq!(
            info_export(facts(false)),
            [0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 1, 0x6d]
        );
        assert_eq!(info_export(facts(true))[10..], [1, 1]);
    }
}
