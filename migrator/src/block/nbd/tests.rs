//! A client of its own: what foreign ones would never send.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Server;
use super::codec::{MAX_OPTION, MAX_PAYLOAD, OPTION_MAGIC};
use crate::block::{Disk, DiskError, Export, Extent, GRANULE, ReadOnly};

const SIZE: u64 = 2 << 20;
const GO: u32 = 7;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZERO: u16 = 6;

struct Lab {
    _dir: tempfile::TempDir,
    disk: Arc<Disk>,
    server: Server,
}

fn lab() -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::create(&dir.path().join("disk"), SIZE).unwrap());
    let server = Server::start(Arc::clone(&disk), &dir.path().join("s")).unwrap();
    Lab {
        _dir: dir,
        disk,
        server,
    }
}

impl Lab {
    /// Past the hello.
    fn connect(&self) -> UnixStream {
        connect(self.server.path())
    }

    /// Ready for requests.
    fn client(&self) -> UnixStream {
        client(self.server.path())
    }
}

fn connect(server: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(server).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    assert_eq!(&bytes::<18>(&mut stream)[..16], b"NBDMAGICIHAVEOPT");
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    stream
}

fn client(server: &Path) -> UnixStream {
    let mut stream = connect(server);
    send_option(&mut stream, GO, &[0; 6]);
    while option_reply(&mut stream) != 1 {}
    stream
}

fn bytes<const N: usize>(stream: &mut UnixStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn send_option(stream: &mut UnixStream, number: u32, data: &[u8]) {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend(number.to_be_bytes());
    message.extend((data.len() as u32).to_be_bytes());
    message.extend(data);
    stream.write_all(&message).unwrap();
}

/// The type of the next reply to an option.
fn option_reply(stream: &mut UnixStream) -> u32 {
    let header = bytes::<20>(stream);
    let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut data = vec![0; number(16) as usize];
    stream.read_exact(&mut data).unwrap();
    number(12)
}

fn send(stream: &mut UnixStream, kind: u16, cookie: u64, offset: u64, len: u32, data: &[u8]) {
    let mut message = 0x2560_9513_u32.to_be_bytes().to_vec();
    message.extend(0_u16.to_be_bytes());
    message.extend(kind.to_be_bytes());
    message.extend(cookie.to_be_bytes());
    message.extend(offset.to_be_bytes());
    message.extend(len.to_be_bytes());
    message.extend(data);
    stream.write_all(&message).unwrap();
}

/// Cookie and error.
fn reply(stream: &mut UnixStream) -> (u64, u32) {
    let header = bytes::<16>(stream);
    assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
    (
        u64::from_be_bytes(header[8..].try_into().unwrap()),
        u32::from_be_bytes(header[4..8].try_into().unwrap()),
    )
}

fn is_cut(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn requests_are_carried_out_and_answered_by_cookie() {
    let lab = lab();
    let mut stream = lab.client();
    send(&mut stream, WRITE, 1, 4096, 5, b"hello");
    assert_eq!(reply(&mut stream), (1, 0));
    send(&mut stream, FLUSH, 2, 0, 0, b"");
    assert_eq!(reply(&mut stream), (2, 0));
    send(&mut stream, READ, 3, 4095, 7, b"");
    assert_eq!(reply(&mut stream), (3, 0));
    assert_eq!(&bytes::<7>(&mut stream), b"\0hello\0");
}

#[test]
fn requests_beyond_the_disk_or_too_long_are_refused_and_the_connection_goes_on() {
    let lab = lab();
    let mut stream = lab.client();
    let wrong = [
        (READ, SIZE, 1),
        (READ, u64::MAX, 4096),
        (READ, 0, MAX_PAYLOAD + 1),
        (4, SIZE - 1, 2),
        (6, 0, u32::MAX),
        (7, 0, 4096),
        (99, 0, 0),
    ];
    for (cookie, (kind, offset, len)) in (10..).zip(wrong) {
        send(&mut stream, kind, cookie, offset, len, b"");
        assert_eq!(reply(&mut stream), (cookie, 22), "{kind} {offset} {len}");
    }
    send(&mut stream, WRITE, 1, SIZE - 1, 2, b"ab");
    assert_eq!(reply(&mut stream), (1, 22));
    send(&mut stream, FLUSH, 2, 0, 0, b"");
    assert_eq!(reply(&mut stream), (2, 0));
}

/// As many sevens.
#[derive(Debug)]
struct Sevens(u64);

impl ReadOnly for Sevens {
    fn path(&self) -> &Path {
        Path::new("sevens")
    }

    fn size(&self) -> u64 {
        self.0
    }

    fn is_ready(&self, _offset: u64, _len: u64) -> bool {
        true
    }

    fn read_at(&self, data: &mut [u8], _offset: u64) -> Result<(), DiskError> {
        data.fill(7);
        Ok(())
    }
}

#[test]
fn an_image_is_read_and_nothing_changes_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = Export::Image(Arc::new(Sevens(SIZE)));
    let server = Server::start(image, &dir.path().join("s")).unwrap();
    let mut stream = client(server.path());
    let changes = [(WRITE, b"hello".as_slice()), (TRIM, b""), (ZERO, b"")];
    for (cookie, (kind, data)) in (1..).zip(changes) {
        send(&mut stream, kind, cookie, 4096, 5, data);
        assert_eq!(reply(&mut stream), (cookie, 1), "{kind}");
    }
    send(&mut stream, READ, 9, 4096, 5, b"");
    assert_eq!(reply(&mut stream), (9, 0));
    assert_eq!(bytes::<5>(&mut stream), [7; 5]);
}

#[test]
fn whoever_breaks_the_protocol_is_cut_off_and_others_are_not() {
    let lab = lab();
    let mut good = lab.client();
    // Not a request; a write longer than allowed, of which nothing may be read or allocated.
    let mut stream = lab.client();
    stream.write_all(&[0x55; 28]).unwrap();
    is_cut(&mut stream);
    let mut stream = lab.client();
    send(&mut stream, WRITE, 1, 0, MAX_PAYLOAD + 1, b"");
    is_cut(&mut stream);
    // Flags that nobody knows; no option; a name for the old option.
    let mut stream = UnixStream::connect(lab.server.path()).unwrap();
    bytes::<18>(&mut stream);
    stream.write_all(&0x80_u32.to_be_bytes()).unwrap();
    is_cut(&mut stream);
    let mut stream = lab.connect();
    stream.write_all(&[0; 16]).unwrap();
    is_cut(&mut stream);
    let mut stream = lab.connect();
    send_option(&mut stream, 1, b"other");
    is_cut(&mut stream);
    send(&mut good, FLUSH, 2, 0, 0, b"");
    assert_eq!(reply(&mut good), (2, 0));
}

#[test]
fn options_that_are_not_known_or_too_long_are_answered() {
    let lab = lab();
    let mut stream = lab.connect();
    send_option(&mut stream, 8, b"");
    assert_eq!(option_reply(&mut stream), 1 << 31 | 1);
    send_option(&mut stream, GO, &vec![0; MAX_OPTION as usize + 1]);
    assert_eq!(option_reply(&mut stream), 1 << 31 | 9);
    send_option(&mut stream, GO, &[0, 0, 0, 9, 0, 0]);
    assert_eq!(option_reply(&mut stream), 1 << 31 | 3);
    send_option(&mut stream, GO, &[0, 0, 0, 1, b'x', 0, 0]);
    assert_eq!(option_reply(&mut stream), 1 << 31 | 6);
    send_option(&mut stream, 3, b"");
    assert_eq!(option_reply(&mut stream), 2);
    assert_eq!(option_reply(&mut stream), 1);
    send_option(&mut stream, 2, b"");
    assert_eq!(option_reply(&mut stream), 1);
    is_cut(&mut stream);
}

#[test]
fn a_request_that_waits_does_not_hold_up_others() {
    let lab = lab();
    let missing = Extent {
        offset: 0,
        len: GRANULE,
    };
    let mut wanted = lab.disk.expect(&[missing]).unwrap();
    let mut stream = lab.client();
    send(&mut stream, READ, 1, 0, 1, b"");
    assert_eq!(wanted.blocking_recv(), Some(missing));
    send(&mut stream, READ, 2, GRANULE, 1, b"");
    assert_eq!(reply(&mut stream), (2, 0));
    bytes::<1>(&mut stream);
    lab.disk
        .supply(0, Some(&vec![3; GRANULE as usize]))
        .unwrap();
    assert_eq!(reply(&mut stream), (1, 0));
    assert_eq!(bytes::<1>(&mut stream), [3]);
}

#[test]
fn requests_that_nobody_reads_the_replies_of_end_with_the_server() {
    let lab = lab();
    let mut stream = lab.client();
    let writer = {
        let mut stream = stream.try_clone().unwrap();
        thread::spawn(move || {
            // Until the server reads no more, since nobody reads its replies; then until it is gone.
            let mut message = Vec::new();
            for _ in 0..64 {
                message.extend(0x2560_9513_u32.to_be_bytes());
                message.extend([0; 20]);
                message.extend((1_u32 << 20).to_be_bytes());
            }
            while stream.write_all(&message).is_ok() {}
        })
    };
    // Of its own accord the server has sent something.
    bytes::<16>(&mut stream);
    drop(lab.server);
    writer.join().unwrap();
    lab.disk.quiesce(Duration::from_secs(20)).unwrap();
}

#[test]
fn a_server_that_is_replaced_serves_the_same_disk() {
    let lab = lab();
    let mut stream = lab.client();
    send(&mut stream, WRITE, 1, 0, 3, b"abc");
    assert_eq!(reply(&mut stream), (1, 0));
    let path = lab.server.path().to_owned();
    drop(lab.server);
    is_cut(&mut stream);
    let again = Server::start(Arc::clone(&lab.disk), &path).unwrap();
    let lab = Lab {
        server: again,
        ..lab
    };
    let mut stream = lab.client();
    send(&mut stream, READ, 1, 0, 3, b"");
    assert_eq!(reply(&mut stream), (1, 0));
    assert_eq!(&bytes::<3>(&mut stream), b"abc");
}

#[test]
fn a_closed_disk_answers_nothing_more() {
    let lab = lab();
    let mut stream = lab.client();
    lab.disk.close();
    send(&mut stream, READ, 1, 0, 1, b"");
    is_cut(&mut stream);
}

#[test]
fn a_read_of_any_place_and_length_gives_what_was_written() {
    let lab = lab();
    let content: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8).collect();
    lab.disk.write_at(&content, 0).unwrap();
    let mut stream = lab.client();
    let reads = [
        (0, SIZE),
        (1, SIZE - 1),
        (4095, 1 << 20),
        (77, 33_000),
        (SIZE - 200_001, 200_001),
    ];
    for (cookie, (offset, len)) in (1..).zip(reads) {
        send(&mut stream, READ, cookie, offset, len as u32, b"");
    }
    let mut open: Vec<u64> = (1..=reads.len() as u64).collect();
    while !open.is_empty() {
        let (cookie, error) = reply(&mut stream);
        assert_eq!(error, 0);
        open.retain(|one| *one != cookie);
        let (offset, len) = reads[cookie as usize - 1];
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data).unwrap();
        assert!(
            data == content[offset as usize..][..len as usize],
            "{offset} {len}"
        );
    }
    // The disk ends there.
    send(&mut stream, READ, 9, SIZE - 4096, 1 << 20, b"");
    assert_eq!(reply(&mut stream), (9, 22));
}
