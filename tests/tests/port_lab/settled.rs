//! A gate that passes frames by its word alone, under traffic, and closes again.

use std::time::Instant;

use anyhow::ensure;
use aya::maps::{Array, Map, MapData};
use migrator::network::{Role, Stage, XdpChoice};
use migrator_ebpf::{ABI, flip_of, is_settled, names};
use tokio::sync::mpsc;

use super::{DEADLINE, Guest, Inbox, Lab, POD_MAC, Setup, check_ledger, pod, say_hello};

const SLOT: u16 = 1;

/// The gate's word, once it says that nothing waits.
fn settled_word(lab: &Lab) -> anyhow::Result<u64> {
    let pin = lab.a.dir.path().join(format!("v{ABI}")).join(names::GATES);
    let map = Map::from_map_data(MapData::from_pin(pin)?)?;
    let words: Array<MapData, u64> = map.try_into()?;
    let until = Instant::now() + DEADLINE;
    loop {
        let word = words.get(&u32::from(SLOT), 0)?;
        if is_settled(word, SLOT) {
            return Ok(word);
        }
        ensure!(Instant::now() < until, "the gate does not settle: {word:x}");
        std::thread::yield_now();
    }
}

#[test]
fn a_gate_settles_under_traffic_each_time_it_opens_and_no_frame_overtakes() -> anyhow::Result<()> {
    const FLIPS: u64 = 6;
    // Seconds of traffic: a flip and what follows take a quarter of one.
    const FRAMES: u64 = 100_000;
    for xdp in [XdpChoice::Off, XdpChoice::On] {
        let lab = Lab::with(Setup {
            xdp,
            ..Setup::default()
        })?;
        let inbox = Inbox::default();
        let at_a = lab
            .a
            .attach(&pod("pod", POD_MAC, 10), SLOT, Role::Local, None)?;
        let guest = Guest::start(at_a.tap_fd()?, &inbox);
        say_hello(&at_a)?;
        let sender = lab.sender(FRAMES)?;
        let mut former = 0;
        for flip in 1..=FLIPS {
            let word = settled_word(&lab)?;
            ensure!(flip_of(word) != former, "of the flip before");
            former = flip_of(word);
            let port = at_a.clone();
            lab.a
                .call(async move { port.hold(mpsc::unbounded_channel().0).await })??;
            let parked = lab.a.ledger(&at_a)?.reasons.parked;
            let until = Instant::now() + DEADLINE;
            while lab.a.ledger(&at_a)?.reasons.parked == parked {
                ensure!(Instant::now() < until, "flip {flip}: nothing is parked");
            }
            let port = at_a.clone();
            lab.a.call(async move {
                port.rollback().await?;
                port.reached(Stage::Local).await
            })??;
        }
        let sent = sender.finish();
        inbox.check(&sent)?;
        check_ledger(&lab.a.settled_ledger(&at_a)?)?;
        settled_word(&lab)?;
        guest.stop();
    }
    Ok(())
}
