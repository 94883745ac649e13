use super::*;

fn bytes(n: u8) -> Bytes {
    Bytes::from(vec![n; 20])
}

#[test]
fn a_log_that_is_sent_again_goes_on_where_the_other_destination_stopped() {
    let mut source = SourceLog::new();
    source.frame(bytes(3), 0);
    source.residue(bytes(1), None);
    source.residue(bytes(2), None);
    source.residue_end();
    source.frame(bytes(4), 0);
    source.end();
    let mut first = InboundLog::new();
    for item in source.unacknowledged() {
        assert!(first.push(item));
    }
    // Killed after each item in turn: what the two take together is everything, once, in order.
    let all: Vec<LogItem> = std::iter::from_fn(|| first.pop()).collect();
    assert_eq!(all.len(), 6);
    for taken in 1..=all.len() {
        let last = &all[taken - 1];
        let mut second = InboundLog::resumed(InboundLog::mark(last.kind, last.seq));
        for item in source.unacknowledged() {
            second.push(item);
        }
        let rest: Vec<LogItem> = std::iter::from_fn(|| second.pop()).collect();
        assert_eq!(rest, all[taken..], "after {last:?}");
    }
}

#[test]
fn residue_is_taken_before_frames_that_arrived_earlier() {
    let mut source = SourceLog::new();
    let mut inbound = InboundLog::new();
    assert!(inbound.push(source.frame(bytes(3), 0)));
    assert!(inbound.push(source.residue(bytes(1), None)));
    assert_eq!(inbound.pop().map(|i| i.frame), Some(bytes(1)));
    assert!(inbound.pop().is_none(), "frames wait for the residue's end");
    assert!(inbound.push(source.residue(bytes(2), None)));
    assert!(inbound.push(source.residue_end().expect("first")));
    assert!(source.residue_end().is_none());
    let kinds: Vec<_> = std::iter::from_fn(|| inbound.pop())
        .map(|i| i.kind)
        .collect();
    assert_eq!(
        kinds,
        [LogKind::Residue, LogKind::ResidueEnd, LogKind::Frame]
    );
}

#[test]
fn an_item_is_taken_once_and_in_order() {
    let mut source = SourceLog::new();
    let mut inbound = InboundLog::new();
    let items: Vec<_> = (0..4).map(|n| source.frame(bytes(n), n)).collect();
    assert!(inbound.push(source.residue_end().expect("first")));
    assert!(inbound.push(items[1].clone()));
    assert!(!inbound.push(items[1].clone()));
    assert!(inbound.pop().is_some(), "the residue's end");
    assert!(inbound.pop().is_none(), "item 0 is missing");
    assert!(inbound.push(items[0].clone()));
    assert_eq!(inbound.pop().map(|i| i.seq), Some(items[0].seq));
    assert_eq!(inbound.pop().map(|i| i.seq), Some(items[1].seq));
    assert!(!inbound.push(items[0].clone()));
    for item in source.unacknowledged() {
        inbound.push(item);
    }
    let rest: Vec<_> = std::iter::from_fn(|| inbound.pop())
        .map(|i| i.seq)
        .collect();
    assert_eq!(rest, [items[2].seq, items[3].seq]);
}

#[test]
fn a_number_of_the_wrong_kind_is_refused() {
    let mut inbound = InboundLog::new();
    for (seq, kind) in [
        (FIRST_FRAME_SEQ, LogKind::Residue),
        (FIRST_SEQ, LogKind::Frame),
        (FIRST_SEQ, LogKind::End),
        (0, LogKind::Residue),
    ] {
        assert!(!inbound.push(mark(seq, kind)), "{seq} {kind:?}");
    }
}

#[test]
fn an_acknowledgement_frees_what_it_covers_and_nothing_else() {
    let mut log = SourceLog::new();
    log.residue(bytes(1), None);
    log.residue_end();
    let first = log.frame(bytes(2), 9).seq;
    log.frame(bytes(3), 8);
    assert_eq!(log.ack(0).len(), 0);
    let freed = log.ack(first);
    let buckets: Vec<_> = freed.iter().map(|k| k.bucket).collect();
    assert_eq!(buckets, [None, Some(9)]);
    assert_eq!((log.len(), log.kept_bytes()), (1, 20));
    assert_eq!(log.ack(u64::MAX).len(), 1);
    assert_eq!((log.len(), log.kept_bytes()), (0, 0));
}

#[test]
fn everything_kept_comes_back_in_order() {
    let mut log = SourceLog::new();
    log.frame(bytes(2), 1);
    log.residue(bytes(1), None);
    log.end();
    let kept: Vec<_> = log.take_all().into_iter().map(|k| k.frame).collect();
    assert_eq!(kept, [bytes(1), bytes(2)]);
    assert_eq!(log.len(), 0);
}

#[test]
fn a_restored_log_sends_the_same_again_and_goes_on_with_the_next_numbers() {
    let mut log = SourceLog::new();
    let mut records = vec![(log.frame(bytes(3), 7), Some(7))];
    records.push((log.residue(bytes(1), None), None));
    records.push((log.residue(bytes(2), Some(4)), Some(4)));
    records.extend(log.residue_end().map(|item| (item, None)));
    records.push((log.frame(bytes(4), 8), Some(8)));
    records.extend(log.end().map(|item| (item, None)));
    records.push((log.frame(bytes(5), 9), Some(9)));
    let mut restored = SourceLog::restored(records.clone(), 0);
    assert_eq!(restored.unacknowledged(), log.unacknowledged());
    assert_eq!((restored.len(), restored.kept_bytes()), (5, 100));
    assert_eq!(restored.kept_from(), (4, 1));
    assert!(restored.residue_end().is_none() && restored.end().is_none());
    assert_eq!(restored.frame(bytes(6), 1), log.frame(bytes(6), 1));

    // Everything up to the second frame was acknowledged, or is back in the TAP.
    let mut restored = SourceLog::restored(records.clone(), FIRST_FRAME_SEQ + 1);
    let kept: Vec<_> = restored.take_all().into_iter().map(|k| k.bucket).collect();
    assert_eq!(kept, [Some(9)]);
    // One of the residue was.
    let mut restored = SourceLog::restored(records, FIRST_SEQ);
    let kept: Vec<_> = restored.take_all().into_iter().map(|k| k.frame).collect();
    assert_eq!(kept, [bytes(2), bytes(3), bytes(4), bytes(5)]);
}

#[test]
fn a_log_restored_from_its_marks_gives_no_number_out_twice() {
    let mut log = SourceLog::new();
    assert!(log.marks().is_empty());
    log.residue_end();
    log.frame(bytes(1), 0);
    log.end();
    log.frame(bytes(2), 0);
    log.ack(u64::MAX);
    for dealt_with in [log.last(), FIRST_FRAME_SEQ] {
        let marks = log.marks().into_iter().map(|item| (item, None));
        let mut restored = SourceLog::restored(marks, dealt_with);
        assert_eq!(restored.len(), 0);
        assert_eq!(restored.unacknowledged(), log.unacknowledged());
        assert_eq!(restored.last(), log.last());
        assert!(restored.frame(bytes(3), 0).seq > log.last());
    }
    let mut nothing_but_the_word = SourceLog::restored([], FIRST_FRAME_SEQ + 4);
    let seq = nothing_but_the_word.frame(bytes(3), 0).seq;
    assert_eq!(seq, FIRST_FRAME_SEQ + 5);
}
