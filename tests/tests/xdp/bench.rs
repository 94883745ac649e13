//! The programs over maps of their own, attached to nothing.

use aya::Ebpf;
use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, HashMap, MapData, PerCpuArray, RingBuf};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use migrator_ebpf::{
    Counter, CounterRow, Device, FrameBytes, Gate, Local, Mode, Outer, bucket, bucket_index, names,
};
use migrator_tests::netns::BpfDir;
use migrator_tests::programs;

use crate::frames::POD;

pub(crate) const LOOPBACK: u32 = 1;
pub(crate) const SLOT: u16 = 3;
const FRAME_MAX: u16 = 1514;

/// linux/bpf.h `enum xdp_action`.
pub(crate) const PASS: u32 = 2;
pub(crate) const REDIRECT: u32 = 4;

pub(crate) struct Bench {
    pub(crate) programs: Ebpf,
    pub(crate) gates: Array<MapData, u64>,
    pub(crate) parked: Array<MapData, u64>,
    pub(crate) done: Array<MapData, u64>,
    pub(crate) passed: Array<MapData, u64>,
    pub(crate) arrived: Array<MapData, u64>,
    pub(crate) devices: HashMap<MapData, u32, Device>,
    pub(crate) locals: HashMap<MapData, [u8; 6], Local>,
    pub(crate) taps: DevMapHash<MapData>,
    pub(crate) outers: HashMap<MapData, u32, Outer>,
    pub(crate) ways_out: DevMapHash<MapData>,
    pub(crate) counters: PerCpuArray<MapData, CounterRow>,
    pub(crate) trace: Array<MapData, u64>,
    pub(crate) ring: RingBuf<MapData>,
    epoch: u32,
    _dir: BpfDir,
}

impl Bench {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let (dir, mut programs) = programs::load()?;
        let program = programs.program_mut(names::UPLINK).expect("in the object");
        let uplink: &mut Xdp = program.try_into()?;
        uplink.load()?;
        let program = programs.program_mut(names::GATE).expect("in the object");
        let gate: &mut SchedClassifier = program.try_into()?;
        gate.load()?;
        let mut take = |name| programs.take_map(name).expect("in the object");
        let mut bench = Self {
            gates: Array::try_from(take(names::GATES))?,
            parked: Array::try_from(take(names::PARKED))?,
            done: Array::try_from(take(names::DONE))?,
            passed: Array::try_from(take(names::PASSED))?,
            arrived: Array::try_from(take(names::ARRIVED))?,
            devices: HashMap::try_from(take(names::DEVICES))?,
            locals: HashMap::try_from(take(names::LOCALS))?,
            taps: DevMapHash::try_from(take(names::TAPS))?,
            outers: HashMap::try_from(take(names::OUTERS))?,
            ways_out: DevMapHash::try_from(take(names::WAYS_OUT))?,
            counters: PerCpuArray::try_from(take(names::COUNTERS))?,
            trace: Array::try_from(take(names::TRACE))?,
            ring: RingBuf::try_from(take(names::TRACE_RING))?,
            programs,
            epoch: 0,
            _dir: dir,
        };
        let local = Local {
            slot: SLOT,
            frame_max: FRAME_MAX,
        };
        bench.locals.insert(POD, local, 0)?;
        bench.taps.insert(u32::from(SLOT), LOOPBACK, None, 0)?;
        bench.set(Mode::Local)?;
        Ok(bench)
    }

    /// Each word has an epoch of its own, as the service sees to.
    pub(crate) fn set(&mut self, mode: Mode) -> anyhow::Result<()> {
        self.epoch += 1;
        let gate = Gate {
            mode,
            may_send: true,
            slot: SLOT,
            epoch: self.epoch,
        };
        Ok(self.gates.set(u32::from(SLOT), gate.to_word(), 0)?)
    }

    pub(crate) fn run(&self, frame: &[u8]) -> anyhow::Result<(u32, Vec<u8>)> {
        let program = self.programs.program(names::UPLINK).expect("in the object");
        let program: &Xdp = program.try_into()?;
        let mut out = vec![0; 4096];
        let result = program.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::default()
        })?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }

    pub(crate) fn fast(&self) -> anyhow::Result<u64> {
        self.count(Counter::Fast)
    }

    pub(crate) fn count(&self, counter: Counter) -> anyhow::Result<u64> {
        let rows = self.counters.get(&u32::from(SLOT), 0)?;
        Ok(rows.iter().map(|row| row.get(counter)).sum())
    }

    pub(crate) fn index(frame: &[u8]) -> u32 {
        bucket_index(SLOT, bucket(&FrameBytes(frame)))
    }

    pub(crate) fn passed(&self, frame: &[u8]) -> anyhow::Result<u64> {
        Ok(self.passed.get(&Self::index(frame), 0)?)
    }

    /// Redirected as it is, and booked as that alone.
    #[track_caller]
    pub(crate) fn is_fast(&self, what: &str, frame: &[u8]) {
        let before = (self.fast().unwrap(), self.passed(frame).unwrap());
        let (action, out) = self.run(frame).unwrap();
        assert_eq!(action, REDIRECT, "{what}");
        assert_eq!(out, frame, "{what}");
        let now = (self.fast().unwrap(), self.passed(frame).unwrap());
        assert_eq!(now, (before.0 + 1, before.1), "{what}");
    }

    /// Left to the kernel as it is, and counted as `frames` that are to come to the gate.
    #[track_caller]
    pub(crate) fn is_left(&self, what: &str, frame: &[u8], frames: u64) {
        let before = (self.fast().unwrap(), self.passed(frame).unwrap());
        let (action, out) = self.run(frame).unwrap();
        assert_eq!(action, PASS, "{what}");
        assert_eq!(out, frame, "{what}");
        let now = (self.fast().unwrap(), self.passed(frame).unwrap());
        assert_eq!(now, (before.0, before.1 + frames), "{what}");
    }

    /// As if the gate had seen the frame.
    pub(crate) fn arrive(&mut self, frame: &[u8], count: u64) -> anyhow::Result<()> {
        let index = Self::index(frame);
        let arrived = self.arrived.get(&index, 0)?;
        Ok(self.arrived.set(index, arrived + count, 0)?)
    }
}
