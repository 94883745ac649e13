//! What a frame costs from the uplink to the TAP: on the fast way (UDP), and on the kernel's (TCP of the same size). As JSON.
//!
//!     uplink-rate [FRAMES] [RUNS]
//!
//! The kernel itself makes the frames (live frames of `BPF_PROG_TEST_RUN`, Documentation/bpf/bpf_prog_run.rst): the program runs on them as if the uplink had
//! received them, and they go where it says. So one CPU does all that is measured, and nothing else. A run ends before the TAP's queue is full;
//! then the queue is read, and every frame must be there.

use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::EbpfLoader;
use aya::programs::{TestRun, TestRunAttrs, TestRunOptions, Xdp};
use migrator::network::{
    Ground, NodeNetConfig, NodeNetwork, ParkLimits, PodNetId, Port, Role, UplinkPath, XdpChoice,
};
use migrator_ebpf::{ABI, names};
use migrator_tests::netns::{BpfDir, Netns, require_root};
use vm_runtime::units::MacAddress;

const POD: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x10];
/// Shortest Ethernet frame, without its checksum.
const FRAME: usize = 60;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Frames that the kernel makes at a time: a NAPI poll's.
const BATCH: u32 = 64;

fn main() -> Result<()> {
    require_root();
    let numbers = std::env::args().skip(1).map(|word| word.parse::<u32>());
    let numbers: Vec<u32> = numbers.collect::<Result<_, _>>()?;
    let (frames, runs) = match numbers.as_slice() {
        [] => (50_000, 7),
        [frames] => (*frames, 7),
        [frames, runs] => (*frames, *runs),
        _ => bail!("takes the number of frames and of runs"),
    };
    ensure!(frames <= 60_000, "the TAP's queue holds 65536 frames");
    ensure!(runs > 0, "at least one run");
    let netns = Netns::new()?;
    netns.ip("link add br0 type bridge forward_delay 0")?;
    netns.ip("link add eth0 type veth peer name p1")?;
    netns.ip("link set eth0 master br0 up")?;
    netns.ip("link set p1 up")?;
    netns.ip("link set br0 up")?;
    let measured = netns.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(measure(frames, runs))
    });
    let report = measured
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    println!("{report}");
    Ok(())
}

async fn measure(frames: u32, runs: u32) -> Result<serde_json::Value> {
    let (dir, spool) = (BpfDir::new()?, tempfile::tempdir()?);
    let network = NodeNetwork::open(NodeNetConfig {
        ground: Ground::Bridge("br0".into()),
        uplink: "eth0".into(),
        xdp: XdpChoice::Auto,
        bpffs: dir.path().to_owned(),
        spool_dir: spool.path().join("spool"),
        tunnel: None,
        park: ParkLimits {
            bytes: 1 << 30,
            bytes_per_pod: 1 << 30,
        },
        cluster: None,
    })
    .await?;
    ensure!(*network.uplink() == UplinkPath::Xdp, "no native XDP");
    let pod = PodNetId {
        name: "pod".into(),
        mac: MacAddress(POD),
        v4: None,
        v6: None,
    };
    let port = network.attach(&pod, 1, Role::Local, None).await?;
    for link in ["eth0", "mt1"] {
        wait_for_port(link).await?;
    }
    // The same program over the same maps.
    let mut programs = EbpfLoader::new()
        .default_map_pin_directory(dir.path().join(format!("v{ABI}")))
        .load(migrator::network::PROGRAMS)?;
    let uplink = programs.program_mut(names::UPLINK).context("the program")?;
    let uplink: &mut Xdp = uplink.try_into()?;
    uplink.load()?;
    let (mut fast, mut kernel) = (Vec::new(), Vec::new());
    for run in 0..=runs {
        for (protocol, times) in [(UDP, &mut fast), (TCP, &mut kernel)] {
            let before = port.ledger().await?.reasons;
            let time = send(uplink, protocol, frames)?;
            drain(&port, protocol, frames)?;
            let now = port.ledger().await?.reasons;
            let took_it = if protocol == UDP {
                now.fast - before.fast
            } else {
                now.passed - before.passed
            };
            ensure!(took_it >= u64::from(frames), "{before:?} {now:?}");
            // The first one is to warm up.
            if run > 0 {
                times.push(time);
            }
        }
    }
    port.discard().await?;
    let (fast, kernel) = (spread(fast), spread(kernel));
    Ok(serde_json::json!({
        "frame_bytes": FRAME,
        "frames": frames,
        "runs": runs,
        "ns_per_packet": {
            "fast": { "min": fast[0], "median": fast[1], "max": fast[2] },
            "kernel": { "min": kernel[0], "median": kernel[1], "max": kernel[2] },
        },
        "packets_per_second": { "fast": 1e9 / fast[1], "kernel": 1e9 / kernel[1] },
        "ratio": kernel[1] / fast[1],
    }))
}

/// A bridge forwards on a port only when it has heard of its carrier, which takes the kernel a second.
async fn wait_for_port(port: &str) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let shown = Command::new("bridge")
            .args(["link", "show", "dev", port])
            .output()?;
        if String::from_utf8_lossy(&shown.stdout).contains("state forwarding") {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{port} does not forward");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Least, middle and most.
fn spread(mut times: Vec<f64>) -> [f64; 3] {
    times.sort_by(f64::total_cmp);
    [times[0], times[times.len() / 2], times[times.len() - 1]]
}

fn frame(protocol: u8) -> Vec<u8> {
    let mut frame = [POD, [0x52, 0x54, 0, 0, 0, 1]].concat();
    frame.extend([0x08, 0x00, 0x45, 0, 0, 46, 0, 1, 0x40, 0, 64, protocol]);
    frame.extend([0, 0, 10, 77, 0, 1, 10, 77, 0, 10]);
    frame.extend([0x13, 0x88, 0, 7, 0, 26]);
    frame.resize(FRAME, 0);
    let words = frame[14..34].chunks(2);
    let sum = words.map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])));
    let checksum = !migrator_ebpf::fold(sum.sum());
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// Nanoseconds a frame.
fn send(uplink: &Xdp, protocol: u8, frames: u32) -> Result<f64> {
    let frame = frame(protocol);
    // linux/bpf.h `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let index = nix::net::if_::if_nametoindex("eth0")?;
    let context = [0, FRAME as u32, 0, index, 0, 0];
    let context: Vec<u8> = context.into_iter().flat_map(u32::to_ne_bytes).collect();
    let began = Instant::now();
    uplink.test_run(TestRunOptions {
        data_in: Some(&frame),
        ctx_in: Some(&context),
        repeat: frames,
        attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
        ..TestRunOptions::default()
    })?;
    Ok(began.elapsed().as_nanos() as f64 / f64::from(frames))
}

/// Every frame must be in the TAP's queue.
fn drain(port: &Port, protocol: u8, frames: u32) -> Result<()> {
    let tap = port.tap_fd()?;
    let mut buffer = vec![0; 2_000];
    let mut count = 0;
    while let Ok(len) = nix::unistd::read(tap.as_fd(), &mut buffer) {
        let frame = &buffer[migrator::network::VNET_HEADER..len];
        count += u32::from(frame.len() == FRAME && frame[23] == protocol);
    }
    ensure!(count == frames, "{count} of {frames} frames arrived");
    Ok(())
}
