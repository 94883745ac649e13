//! What a device's driver can do with XDP, by the kernel's "netdev" family of generic netlink (Documentation/netlink/specs/netdev.yaml).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

/// linux/genetlink.h: `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, and its attributes of a family's number and name.
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// linux/netdev.h: `NETDEV_CMD_DEV_GET`, `NETDEV_A_DEV_IFINDEX`, `NETDEV_A_DEV_XDP_FEATURES`, `NETDEV_XDP_ACT_NDO_XMIT`.
const GET_DEVICE: u8 = 1;
const IFINDEX: u16 = 1;
const XDP_FEATURES: u16 = 3;
const TAKES_REDIRECTED: u64 = 4;

/// `struct nlmsghdr`, and `struct genlmsghdr` behind it.
const HEADER: usize = 16;
const HEADERS: usize = HEADER + 4;

/// Whether a device takes frames that another device's program redirects to it. Of the calling thread's network namespace.
///
/// # Errors
/// The kernel is older than 6.3 and cannot say, or there is no such device.
pub(super) fn takes_redirected(index: u32) -> io::Result<bool> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkGeneric,
    )?;
    // It answers within the call that asks.
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(1, 0))?;
    let family = ask(&socket, (CONTROL, GET_FAMILY), (FAMILY_NAME, b"netdev\0"))?;
    let [low, high] = attribute(&family, FAMILY_ID)?;
    let family = u16::from_ne_bytes([low, high]);
    let device = ask(
        &socket,
        (family, GET_DEVICE),
        (IFINDEX, &index.to_ne_bytes()),
    )?;
    let features = u64::from_ne_bytes(attribute(&device, XDP_FEATURES)?);
    Ok(features & TAKES_REDIRECTED != 0)
}

/// The attributes of the answer.
fn ask(
    socket: &OwnedFd,
    (family, command): (u16, u8),
    (kind, value): (u16, &[u8]),
) -> io::Result<Vec<u8>> {
    let length = 4 + value.len();
    let mut message = Vec::with_capacity(HEADERS + length);
    message.extend(((HEADERS + length) as u32).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 8]);
    // Version 1.
    message.extend([command, 1, 0, 0]);
    message.extend((length as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = vec![0; 8192];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(length);
    let odd = || io::Error::from(io::ErrorKind::InvalidData);
    let kind = answer.get(4..6).ok_or_else(odd)?;
    if kind == (libc::NLMSG_ERROR as u16).to_ne_bytes() {
        let errno: [u8; 4] = answer
            .get(HEADER..HEADERS)
            .ok_or_else(odd)?
            .try_into()
            .map_err(|_| odd())?;
        return Err(io::Error::from_raw_os_error(-i32::from_ne_bytes(errno)));
    }
    Ok(answer.get(HEADERS..).ok_or_else(odd)?.to_vec())
}

/// One attribute, of `N` bytes.
fn attribute<const N: usize>(mut attributes: &[u8], wanted: u16) -> io::Result<[u8; N]> {
    while let [a, b, c, d, rest @ ..] = attributes {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let Some(value) = length.checked_sub(4).and_then(|length| rest.get(..length)) else {
            break;
        };
        if u16::from_ne_bytes([*c, *d]) == wanted
            && let Ok(value) = value.try_into()
        {
            return Ok(value);
        }
        attributes = rest
            .get(value.len().next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Err(io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attribute_is_found_behind_others_and_a_broken_one_ends_the_search() {
        let mut bytes = vec![5, 0, 9, 0, 1, 0, 0, 0];
        bytes.extend([6, 0, 1, 0, 0x34, 0x12, 0, 0]);
        assert_eq!(attribute(&bytes, 1).unwrap(), [0x34, 0x12]);
        assert!(attribute::<4>(&bytes, 1).is_err(), "of another length");
        assert!(attribute::<2>(&bytes, 2).is_err());
        bytes[0] = 200;
        assert!(attribute::<2>(&bytes, 1).is_err());
        assert!(attribute::<2>(&[3, 0, 1, 0], 1).is_err());
    }

    #[test]
    fn a_device_that_is_not_there_takes_nothing() {
        assert!(takes_redirected(u32::MAX).is_err());
    }
}
