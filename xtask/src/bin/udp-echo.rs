//! The demo image's UDP echo: everything that comes to port 7000 goes back to its sender, over IPv4 and IPv6.
//!
//! Built by `rustc` alone (std, static), so that the image needs no libraries. Its receive buffer is
//! large: after a switchover the frames that were held arrive in one burst, and a drop here would be
//! counted as a loss of the migration.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

/// `SOL_SOCKET`, `SO_RCVBUF` and `SO_RCVBUFFORCE` of asm-generic/socket.h (x86_64 uses it unchanged).
const SOL_SOCKET: i32 = 1;
const SO_RCVBUF: i32 = 8;
const SO_RCVBUFFORCE: i32 = 33;
/// Bytes: half a minute of the demo's probe.
static BUFFER: i32 = 16 << 20;

unsafe extern "C" {
    fn setsockopt(fd: i32, level: i32, name: i32, value: *const i32, length: u32) -> i32;
}

fn enlarge(socket: &UdpSocket) {
    // Past the sysctl's limit where that is allowed, else up to it.
    for option in [SO_RCVBUF, SO_RCVBUFFORCE] {
        // SAFETY: setsockopt(2) reads 4 bytes through the pointer, which lives across the call; the descriptor
        // is borrowed from a live socket. A refusal leaves the buffer as it was, which is what we want then.
        unsafe { setsockopt(socket.as_raw_fd(), SOL_SOCKET, option, &raw const BUFFER, 4) };
    }
}

fn main() -> ExitCode {
    // A socket on [::] takes IPv4 as well, unless the kernel has no IPv6.
    let socket = match UdpSocket::bind("[::]:7000").or_else(|_| UdpSocket::bind("0.0.0.0:7000")) {
        Ok(socket) => socket,
        Err(error) => {
            eprintln!("udp-echo: cannot bind port 7000: {error}");
            return ExitCode::FAILURE;
        }
    };
    enlarge(&socket);
    println!("udp-echo: port 7000");
    let mut datagram = vec![0; 65536];
    loop {
        // An error belongs to one datagram (an ICMP answer to an earlier one): the next is served all the same.
        if let Ok((length, peer)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], peer);
        }
    }
}
