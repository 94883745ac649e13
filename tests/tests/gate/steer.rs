//! The verdicts of the program that sends the kernel's routed packets to the nodes of their pods.

use migrator_ebpf::{
    EndMarker, Endpoint, GATEWAY_MAC, Landing, MAX_NODES, Place, Steered, Tunnel, landing_key,
    mapped,
};

use crate::bench::{Bench, DROP, LOOPBACK, NEXT, REDIRECT, SLOT};
use crate::frames::{POD, frames, is_group};

const INDEX: u32 = 5;
const OTHER: u16 = 2;
const TO_OTHER: Tunnel = Tunnel {
    device: LOOPBACK,
    vni: 77,
    family: 4,
    remote: [127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// A pod at 10.77.0.10 and fd00::a, as in [`frames`].
fn bench(node: u16) -> anyhow::Result<Bench> {
    let mut bench = Bench::new()?;
    let mut v6 = [0; 16];
    (v6[0], v6[15]) = (0xfd, 10);
    for address in [mapped([10, 77, 0, 10]), v6] {
        let endpoint = Endpoint {
            index: INDEX,
            mac: POD,
            spare: 0,
        };
        bench.endpoints.insert(address, endpoint, 0)?;
    }
    bench.nodes.set(u32::from(OTHER), TO_OTHER, 0)?;
    place(&mut bench, node)?;
    Ok(bench)
}

fn place(bench: &mut Bench, node: u16) -> anyhow::Result<()> {
    Ok(bench
        .places
        .set(INDEX, Place { node, epoch: 1 }.to_word(), 0)?)
}

/// As the kernel routes it: to the gateway.
fn routed(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&GATEWAY_MAC);
    frame
}

fn packets() -> Vec<Vec<u8>> {
    let ip = |kind: &[u8]| kind == [0x08, 0x00] || kind == [0x86, 0xdd];
    let frames = frames().into_iter();
    frames
        .filter(|frame| !is_group(frame) && frame.gso.is_none() && ip(&frame.bytes[12..14]))
        .map(|frame| routed(frame.bytes))
        .collect()
}

#[test]
fn one_store_moves_a_pod_of_both_families() -> anyhow::Result<()> {
    let mut bench = bench(OTHER)?;
    let landing = Landing {
        tap: LOOPBACK,
        vni: 77,
        slot: SLOT,
        spare: 0,
    };
    bench.landings.insert(landing_key(POD), landing, 0)?;
    assert!(packets().len() >= 6);
    for frame in packets() {
        place(&mut bench, OTHER)?;
        let (verdict, out, counted) = bench.steer(&frame)?;
        assert_eq!((verdict, counted), (NEXT, Steered::Sent));
        assert_eq!(out[..6], POD);
        assert_eq!(out[6..12], GATEWAY_MAC);
        assert_eq!(out[12..], frame[12..]);
        place(&mut bench, 0)?;
        let (verdict, out, counted) = bench.steer(&frame)?;
        assert_eq!((verdict, counted), (REDIRECT, Steered::Here));
        assert_eq!(out[..6], POD);
    }
    Ok(())
}

#[test]
fn what_is_no_pods_is_dropped_and_counted() -> anyhow::Result<()> {
    let mut bench = bench(0)?;
    for frame in packets() {
        let (verdict, _, counted) = bench.steer(&frame)?;
        assert_eq!(
            (verdict, counted),
            (DROP, Steered::Nowhere),
            "here, and no TAP"
        );
    }
    place(&mut bench, 9)?;
    for frame in packets() {
        let (verdict, _, counted) = bench.steer(&frame)?;
        assert_eq!(
            (verdict, counted),
            (DROP, Steered::Nowhere),
            "a node without address"
        );
    }
    place(&mut bench, MAX_NODES as u16)?;
    for frame in packets() {
        assert_eq!(bench.steer(&frame)?.2, Steered::Nowhere, "no such node");
        let mut other = frame.clone();
        // The last byte of either destination.
        let at = if frame[12] == 0x08 { 33 } else { 53 };
        other[at] ^= 1;
        let (verdict, _, counted) = bench.steer(&other)?;
        assert_eq!((verdict, counted), (DROP, Steered::Unknown));
    }
    let ip = |kind: &[u8]| kind == [0x08, 0x00] || kind == [0x86, 0xdd];
    for frame in frames() {
        if is_group(&frame) || !ip(&frame.bytes[12..14]) {
            let (verdict, _, counted) = bench.steer(&frame.bytes)?;
            assert_eq!((verdict, counted), (DROP, Steered::NoIp), "{}", frame.name);
        }
    }
    Ok(())
}

#[test]
fn an_end_marker_goes_to_the_node_that_it_names() -> anyhow::Result<()> {
    let bench = bench(0)?;
    let marker = EndMarker {
        node: OTHER,
        part: 17,
        parts: 32,
        nonce: 9,
    };
    let frame = marker.frame(POD);
    let (verdict, out, counted) = bench.steer(&frame)?;
    assert_eq!((verdict, counted), (NEXT, Steered::Marker));
    assert_eq!(out, frame);
    let nowhere = EndMarker { node: 7, ..marker };
    let (verdict, _, counted) = bench.steer(&nowhere.frame(POD))?;
    assert_eq!((verdict, counted), (DROP, Steered::Nowhere));
    Ok(())
}
