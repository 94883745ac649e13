//! The frame that goes into a TAP behind the last one of a guest that is about to be stopped. Pure.
//!
//! QEMU takes one frame off the TAP even when the guest has no room for it, and drops that frame when
//! the VM stops. With this one in the last place, what it drops is nobody's.

use vm_runtime::units::MacAddress;

use super::sys::VNET_HEADER;

/// EtherType for local experiments (IEEE 802, "Local Experimental Ethertype 1"): no guest listens to it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// Behind the EtherType, so that somebody else's experiment is not taken for ours.
const MAGIC: &[u8] = b"migrator drain";
/// Ethernet's shortest frame, without the check sequence.
const LENGTH: usize = 60;

/// The marker for the guest at `mac`, behind an empty virtio-net header.
pub(crate) fn marker(mac: MacAddress) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend_from_slice(&mac.0);
    // Locally administered: nobody's.
    frame.extend_from_slice(&[0x02, 0, 0, 0, 0, 0]);
    frame.extend_from_slice(&ETHERTYPE);
    frame.extend_from_slice(MAGIC);
    frame.resize(VNET_HEADER + LENGTH, 0);
    frame
}

/// Whether a frame behind its virtio-net header is a marker.
pub(crate) fn is_marker(frame: &[u8]) -> bool {
    let body = frame.get(VNET_HEADER + 12..).unwrap_or_default();
    body.strip_prefix(&ETHERTYPE)
        .is_some_and(|rest| rest.starts_with(MAGIC))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_known_again_and_nothing_else_is() {
        let frame = marker(MacAddress([0x52, 0x54, 0, 1, 2, 3]));
        assert_eq!(frame.len(), VNET_HEADER + LENGTH);
        assert!(is_marker(&frame));
        assert!(!is_marker(&frame[..VNET_HEADER + 13]));
        let mut other = frame;
        other[VNET_HEADER + 13] ^= 1;
        assert!(!is_marker(&other));
    }
}
