//! What the pure parts must find: every way in which memory or a stream may be wrong.

use std::ops::Range;

use super::blocks::{Arena, Fault, Looks};
use super::stream::{self, Fault as StreamFault, Messages, Side, hello, read_hello};

const KIB: usize = 1024;

fn arena() -> Arena {
    Arena::new(7, 3000 * KIB)
}

/// Where a block's words are.
fn place(arena: &Arena, block: usize) -> Range<usize> {
    let entry = arena.table[block];
    entry.start..entry.start + entry.words
}

/// Two blocks of one size.
fn twins(arena: &Arena) -> (usize, usize) {
    let size = |block: &usize| arena.table[*block].words;
    let pairs = (0..arena.blocks()).flat_map(|one| (0..one).map(move |other| (one, other)));
    pairs
        .into_iter()
        .find(|(one, other)| size(one) == size(other))
        .expect("a large arena has two blocks of one size")
}

fn looks(arena: &Arena, block: usize) -> Looks {
    match arena.verify(block).expect_err("it is spoilt") {
        Fault::Block { looks, .. } => looks,
        fault @ Fault::Table { .. } => panic!("{fault}"),
    }
}

#[test]
fn blocks_fill_the_memory_and_are_right_in_each_generation() {
    let mut arena = arena();
    let mut end = 0;
    for block in 0..arena.blocks() {
        let place = place(&arena, block);
        assert_eq!(place.start, end);
        end = place.end;
        let bytes = place.len() * 8;
        assert!((4 * KIB..=256 * KIB).contains(&bytes), "{bytes}");
        assert_eq!(arena.verify(block), Ok(bytes));
        assert_eq!(arena.rewrite(block), bytes);
        assert_eq!(arena.verify(block), Ok(bytes));
    }
    assert!(arena.bytes() > 2990 * KIB && arena.bytes() <= 3000 * KIB);
    assert!(arena.words.iter().filter(|word| **word == 0).count() < 10);
    assert_eq!(arena.verify_table(), Ok(()));
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let mut arena = arena();
    let place = place(&arena, 3);
    for index in [0, 1, 2, 3, place.len() / 2, place.len() - 1] {
        let right = arena.words[place.start + index];
        arena.words[place.start + index] ^= 1 << 40;
        match arena.verify(3).expect_err("a bit is wrong") {
            Fault::Block {
                offset,
                at,
                expected,
                found,
                wrong_words: 1,
                looks: Looks::Torn,
                ..
            } => {
                assert_eq!((offset, at), (index * 8, (place.start + index) * 8));
                assert_eq!((expected, found), (right, right ^ 1 << 40));
            }
            fault => panic!("{fault}"),
        }
        arena.words[place.start + index] = right;
    }
    arena.verify(3).unwrap();
}

#[test]
fn an_old_generation_is_found_and_named() {
    let mut arena = arena();
    let place = place(&arena, 2);
    let old = arena.words[place.clone()].to_vec();
    arena.rewrite(2);
    arena.words[place].copy_from_slice(&old);
    let whole = Looks::Whole {
        block: 2,
        generation: 1,
    };
    assert_eq!(looks(&arena, 2), whole);
}

#[test]
fn a_page_of_an_old_generation_is_found_where_it_begins() {
    let mut arena = arena();
    let block = (0..arena.blocks())
        .find(|block| place(&arena, *block).len() > 2048)
        .unwrap();
    let page = place(&arena, block).start.next_multiple_of(512);
    let old = arena.words[page..page + 512].to_vec();
    arena.rewrite(block);
    arena.words[page..page + 512].copy_from_slice(&old);
    match arena.verify(block).expect_err("a page is old") {
        Fault::Block {
            at,
            wrong_words,
            looks: Looks::Torn,
            ..
        } => assert!((page..page + 3).contains(&(at / 8)) && wrong_words > 500),
        fault => panic!("{fault}"),
    }
}

#[test]
fn swapped_blocks_are_found_and_named() {
    let mut arena = Arena::new(7, 12_000 * KIB);
    let (one, other) = twins(&arena);
    let (first, second) = (place(&arena, one), place(&arena, other));
    let saved = arena.words[first.clone()].to_vec();
    arena.words.copy_within(second.clone(), first.start);
    arena.words[second].copy_from_slice(&saved);
    for (here, there) in [(one, other), (other, one)] {
        let whole = Looks::Whole {
            block: there as u64,
            generation: 1,
        };
        assert_eq!(looks(&arena, here), whole);
    }
}

#[test]
fn a_lost_block_is_zero() {
    let mut arena = arena();
    let place = place(&arena, 1);
    arena.words[place].fill(0);
    assert_eq!(looks(&arena, 1), Looks::Zero);
}

#[test]
fn a_changed_table_is_found() {
    let mut arena = arena();
    arena.rewrite(0);
    arena.verify_table().unwrap();
    arena.table[5].generation ^= 1;
    arena.verify_table().unwrap_err();
}

#[test]
fn arenas_of_different_seeds_differ() {
    let (one, other) = (arena(), Arena::new(8, 3000 * KIB));
    let pairs = one.words.iter().zip(&other.words);
    assert!(pairs.filter(|(a, b)| a == b).count() < 10);
}

/// Bytes of the first messages of a side, each by itself.
fn sent(connection: u64, side: Side, count: usize) -> Vec<Vec<u8>> {
    let mut messages = Messages::of(connection, side);
    (0..count).map(|_| messages.write()).collect()
}

/// Reads them as the client's of connection 1; how many were right.
fn received(bytes: &[u8]) -> Result<usize, StreamFault> {
    let (mut from, mut messages, mut count) = (bytes, Messages::of(1, Side::Client), 0);
    while messages.read(&mut from)? {
        count += 1;
    }
    Ok(count)
}

#[test]
fn a_whole_stream_is_right_and_its_lengths_differ() {
    let sent = sent(1, Side::Client, 50);
    assert_eq!(received(&sent.concat()).unwrap(), 50);
    let lengths: std::collections::HashSet<usize> = sent.iter().map(Vec::len).collect();
    assert!(lengths.len() > 40, "{lengths:?}");
}

#[test]
fn a_lost_a_doubled_and_a_reordered_message_are_found() {
    let sent = sent(1, Side::Client, 3);
    for (order, expected, found) in [(vec![0, 2], 1, 2), (vec![0, 0], 1, 0), (vec![1, 0], 0, 1)] {
        let bytes: Vec<u8> = order
            .iter()
            .flat_map(|i: &usize| sent[*i].clone())
            .collect();
        match received(&bytes).unwrap_err() {
            StreamFault::OutOfTurn {
                expected: e,
                found: f,
            } => assert_eq!((e, f), (expected, found)),
            fault => panic!("{fault}"),
        }
    }
}

#[test]
fn any_changed_bit_and_any_lost_or_doubled_byte_is_found() {
    let bytes = sent(1, Side::Client, 2).concat();
    let places = (0..40).chain([bytes.len() / 2, bytes.len() - 1]);
    for place in places {
        let mut changed = bytes.clone();
        changed[place] ^= 4;
        received(&changed).unwrap_err();
        let mut shorter = bytes.clone();
        shorter.remove(place);
        received(&shorter).unwrap_err();
        let mut longer = bytes.clone();
        longer.insert(place, bytes[place]);
        received(&longer).unwrap_err();
    }
    assert!(matches!(
        received(&bytes[..bytes.len() - 1]),
        Err(StreamFault::Cut)
    ));
}

#[test]
fn messages_of_another_connection_or_side_are_found() {
    for other in [sent(2, Side::Client, 1), sent(1, Side::Server, 1)] {
        received(&other.concat()).unwrap_err();
    }
}

#[test]
fn a_connection_begins_with_its_number() {
    assert_eq!(read_hello(&mut hello(77).as_slice()).unwrap(), 77);
    let mut wrong = hello(77);
    wrong[0] ^= 1;
    assert!(matches!(
        read_hello(&mut wrong.as_slice()),
        Err(stream::Fault::NoHello)
    ));
    assert!(matches!(
        read_hello(&mut &wrong[..9]),
        Err(stream::Fault::Cut)
    ));
}
