//! The programs, loaded and attached to nothing: frames come by `BPF_PROG_TEST_RUN`.

use anyhow::Context;
use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData, PerCpuArray, RingBuf};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use migrator_ebpf::{
    BUCKETS, Counter, CounterRow, Device, Endpoint, FrameBytes, Gate, Landing, Lead, Mode, SentKey,
    Steered, TraceEvent, Tunnel, bucket, bucket_index, names, settle,
};
use migrator_tests::netns::BpfDir;
use migrator_tests::programs;

use crate::frames::{Frame, POD};

pub(crate) const LOOPBACK: u32 = 1;
pub(crate) const SLOT: u16 = 3;

/// linux/bpf.h `TCX_NEXT`, `TCX_DROP`, `TCX_REDIRECT`, as the test run returns them.
pub(crate) const NEXT: u32 = -1i32 as u32;
pub(crate) const DROP: u32 = 2;
pub(crate) const REDIRECT: u32 = 7;

/// linux/bpf.h `struct __sk_buff`: its size, and where it has these.
const SK_BUFF: usize = 192;
const MARK: usize = 8;
const PRIORITY: usize = 32;
const GSO_SEGS: usize = 164;
const GSO_SIZE: usize = 176;

pub(crate) struct Bench {
    programs: Ebpf,
    pub(crate) gates: Array<MapData, u64>,
    pub(crate) trace: Array<MapData, u64>,
    pub(crate) missed: Array<MapData, u64>,
    pub(crate) ring: RingBuf<MapData>,
    /// What aya-log writes into.
    pub(crate) logs: RingBuf<MapData>,
    pub(crate) devices: HashMap<MapData, u32, Device>,
    pub(crate) briefs: Array<MapData, u64>,
    pub(crate) tunnels: Array<MapData, Tunnel>,
    pub(crate) landings: HashMap<MapData, u64, Landing>,
    pub(crate) leads: HashMap<MapData, SentKey, Lead>,
    pub(crate) led: Array<MapData, u64>,
    pub(crate) endpoints: HashMap<MapData, [u8; 16], Endpoint>,
    pub(crate) places: Array<MapData, u64>,
    pub(crate) nodes: Array<MapData, Tunnel>,
    steered: PerCpuArray<MapData, u64>,
    parked: Array<MapData, u64>,
    done: Array<MapData, u64>,
    pub(crate) injected: Array<MapData, u64>,
    pub(crate) injected_next: Array<MapData, u64>,
    counters: PerCpuArray<MapData, CounterRow>,
    _dir: BpfDir,
}

/// What a frame has changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) verdict: u32,
    /// The counters that went up, each by how much.
    pub(crate) counted: Vec<(Counter, u64)>,
    /// The buckets whose `parked` went up, each by how much.
    pub(crate) parked: Vec<(u8, u64)>,
}

impl Bench {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let (dir, mut programs) = programs::load()?;
        for name in [names::GATE, names::GUARD, names::LANDING, names::STEER] {
            let program: &mut SchedClassifier = programs
                .program_mut(name)
                .expect("in the object")
                .try_into()?;
            program.load()?;
        }
        let mut take = |name| programs.take_map(name).context(name);
        let mut bench = Self {
            gates: Array::try_from(take(names::GATES)?)?,
            trace: Array::try_from(take(names::TRACE)?)?,
            missed: Array::try_from(take(names::TRACE_MISSED)?)?,
            ring: RingBuf::try_from(take(names::TRACE_RING)?)?,
            logs: RingBuf::try_from(take("AYA_LOGS")?)?,
            parked: Array::try_from(take(names::PARKED)?)?,
            done: Array::try_from(take(names::DONE)?)?,
            injected: Array::try_from(take(names::INJECTED)?)?,
            injected_next: Array::try_from(take(names::INJECTED_NEXT)?)?,
            devices: HashMap::try_from(take(names::DEVICES)?)?,
            briefs: Array::try_from(take(names::BRIEFS)?)?,
            tunnels: Array::try_from(take(names::TUNNELS)?)?,
            landings: HashMap::try_from(take(names::LANDINGS)?)?,
            leads: HashMap::try_from(take(names::LEADS)?)?,
            led: Array::try_from(take(names::LED)?)?,
            endpoints: HashMap::try_from(take(names::ENDPOINTS)?)?,
            places: Array::try_from(take(names::PLACES)?)?,
            nodes: Array::try_from(take(names::NODES)?)?,
            steered: PerCpuArray::try_from(take(names::STEERED)?)?,
            counters: PerCpuArray::try_from(take(names::COUNTERS)?)?,
            programs,
            _dir: dir,
        };
        let device = Device {
            park: LOOPBACK,
            out: 0,
            tunnel: 0,
            uplink: 0,
            slot: SLOT,
            mac: POD,
        };
        bench.devices.insert(LOOPBACK, device, 0)?;
        Ok(bench)
    }

    pub(crate) fn set(&mut self, mode: Mode, may_send: bool, epoch: u32) -> anyhow::Result<()> {
        let gate = Gate {
            mode,
            may_send,
            slot: SLOT,
            epoch,
        };
        Ok(self.gates.set(u32::from(SLOT), gate.to_word(), 0)?)
    }

    /// As if the service had found that nothing waits.
    pub(crate) fn settle(&mut self) -> anyhow::Result<()> {
        let word = self.gates.get(&u32::from(SLOT), 0)?;
        Ok(self.gates.set(u32::from(SLOT), settle(word), 0)?)
    }

    pub(crate) fn run(&self, program: &'static str, frame: &Frame) -> anyhow::Result<u32> {
        let mut context = [0; SK_BUFF];
        if let Some((segments, size)) = frame.gso {
            context[GSO_SEGS..GSO_SEGS + 4].copy_from_slice(&u32::to_ne_bytes(segments));
            context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&u32::to_ne_bytes(size));
        }
        let loaded = self.programs.program(program).expect("in the object");
        let loaded: &SchedClassifier = loaded.try_into()?;
        let options = TestRunOptions {
            data_in: Some(&frame.bytes),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let result = loaded
            .test_run(options)
            .with_context(|| format!("{program} on {}", frame.name))?;
        Ok(result.return_value)
    }

    /// Runs the gate on a frame with these marks: its verdict, and the marks as it left them.
    pub(crate) fn run_marked(
        &self,
        frame: &Frame,
        (mark, priority): (u32, u32),
    ) -> anyhow::Result<(u32, (u32, u32))> {
        let mut context = [0; SK_BUFF];
        context[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
        context[PRIORITY..PRIORITY + 4].copy_from_slice(&priority.to_ne_bytes());
        let mut after = [0; SK_BUFF];
        let loaded = self.programs.program(names::GATE).expect("in the object");
        let loaded: &SchedClassifier = loaded.try_into()?;
        let options = TestRunOptions {
            data_in: Some(&frame.bytes),
            ctx_in: Some(&context),
            ctx_out: Some(&mut after),
            ..TestRunOptions::default()
        };
        let verdict = loaded.test_run(options)?.return_value;
        let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| after[at + byte]));
        Ok((verdict, (word(MARK), word(PRIORITY))))
    }

    /// Runs `steer`: its verdict, the frame as it left it, and the one counter that it raised.
    pub(crate) fn steer(&self, frame: &[u8]) -> anyhow::Result<(u32, Vec<u8>, Steered)> {
        let before = self.steered()?;
        let loaded = self.programs.program(names::STEER).expect("in the object");
        let loaded: &SchedClassifier = loaded.try_into()?;
        let mut out = vec![0; frame.len()];
        let mut context = [0; SK_BUFF];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_out: Some(&mut context),
            ..TestRunOptions::default()
        };
        let verdict = loaded.test_run(options)?.return_value;
        let after = self.steered()?;
        let raised = |(at, _): &(usize, &u64)| after[*at] > before[*at];
        let mut raised = before.iter().enumerate().filter(raised);
        let (at, _) = raised.next().context("it counts nothing")?;
        anyhow::ensure!(raised.next().is_none(), "it counts twice");
        Ok((verdict, out, Steered::ALL[at]))
    }

    fn steered(&self) -> anyhow::Result<Vec<u64>> {
        let sum = |counter| Ok(self.steered.get(&(counter as u32), 0)?.iter().sum());
        Steered::ALL.into_iter().map(sum).collect()
    }

    pub(crate) fn count(&self, row: u32, counter: Counter) -> anyhow::Result<u64> {
        let rows = self.counters.get(&row, 0)?;
        Ok(rows.iter().map(|row| row.get(counter)).sum())
    }

    /// Runs a program on a frame; all that it has changed of the slot.
    pub(crate) fn change(&self, program: &'static str, frame: &Frame) -> anyhow::Result<Change> {
        let before = self.books()?;
        let verdict = self.run(program, frame)?;
        let after = self.books()?;
        let moved = |now: &[u64], then: &[u64]| -> Vec<u64> {
            now.iter().zip(then).map(|(now, then)| now - then).collect()
        };
        let counted = moved(&after.0, &before.0);
        let parked = moved(&after.1, &before.1);
        Ok(Change {
            verdict,
            counted: Counter::ALL
                .into_iter()
                .zip(counted)
                .filter(|(_, up)| *up > 0)
                .collect(),
            parked: (0..=u8::MAX)
                .zip(parked)
                .filter(|(_, up)| *up > 0)
                .collect(),
        })
    }

    fn books(&self) -> anyhow::Result<(Vec<u64>, Vec<u64>)> {
        let row = u32::from(SLOT);
        let counters: anyhow::Result<_> = Counter::ALL
            .into_iter()
            .map(|counter| self.count(row, counter))
            .collect();
        let first = bucket_index(SLOT, 0);
        let parked: Result<_, _> = (first..first + BUCKETS)
            .map(|index| self.parked.get(&index, 0))
            .collect();
        Ok((counters?, parked?))
    }

    /// So many frames wait in the bucket of `frame`; nothing in any other.
    pub(crate) fn let_wait(&mut self, frame: &Frame, waiting: u64) -> anyhow::Result<()> {
        for bucket in 0..=u8::MAX {
            let index = bucket_index(SLOT, bucket);
            let parked = self.parked.get(&index, 0)?;
            self.done.set(index, parked, 0)?;
        }
        let index = bucket_index(SLOT, bucket_of(frame));
        let done = self.done.get(&index, 0)?;
        Ok(self.parked.set(index, done + waiting, 0)?)
    }

    /// What the programs have told since the last call.
    pub(crate) fn events(&mut self) -> Vec<TraceEvent> {
        let mut events = Vec::new();
        while let Some(item) = self.ring.next() {
            events.push(TraceEvent::from_bytes(&item).expect("whole events"));
        }
        events
    }

    /// How many lines the programs have logged since the last call.
    pub(crate) fn logged(&mut self) -> usize {
        let mut lines = 0;
        while self.logs.next().is_some() {
            lines += 1;
        }
        lines
    }
}

pub(crate) fn bucket_of(frame: &Frame) -> u8 {
    bucket(&FrameBytes(&frame.bytes))
}
