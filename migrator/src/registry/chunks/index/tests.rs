use super::*;

const CHUNK: u32 = 64 << 10;
const MANIFEST: Digest = Digest([7; 32]);

/// Four chunks: one, zeros, the same one, a short one of another digest.
fn record() -> ImageRecord {
    let zeros = Digest::of(&vec![0; CHUNK as usize]);
    let chunks = vec![Digest([1; 32]), zeros, Digest([1; 32]), Digest([2; 32])];
    let erofs_size = u64::from(CHUNK) * 3 + 4096;
    ImageRecord {
        name: "app:1".to_owned(),
        manifest_digest: MANIFEST,
        config: ImageConfig {
            cmd: vec!["/bin/app".to_owned()],
            ..ImageConfig::default()
        },
        erofs_digest: ImageRecord::digest_of(erofs_size, CHUNK, &chunks),
        erofs_size,
        chunk_size: CHUNK,
        chunks,
    }
}

fn places() -> Vec<Place> {
    let place = |byte: u8, offset, length, plain| Place {
        digest: Digest([byte; 32]),
        pack: 0,
        offset,
        length,
        plain,
    };
    vec![place(1, 0, 1000, CHUNK), place(2, 1000, 4096, 4096)]
}

fn encoded() -> Vec<u8> {
    ChunkIndex::encode(&record(), &places(), &[3, 0]).unwrap()
}

fn decode(bytes: &[u8]) -> Result<ChunkIndex, BadIndex> {
    ChunkIndex::decode(bytes, MANIFEST, "app:1", &[5096])
}

#[test]
fn an_index_reads_as_it_was_written() {
    let index = decode(&encoded()).unwrap();
    assert_eq!(index.record(), &record());
    assert_eq!(index.first_uses(), [3, 0]);
    let at = |chunk| index.place(chunk).copied();
    assert_eq!(
        [at(0), at(1), at(2), at(3), at(4)],
        [
            Some(places()[0]),
            None,
            Some(places()[0]),
            Some(places()[1]),
            None
        ]
    );
    assert_eq!(index.stored_bytes(), 5096);
}

#[test]
fn the_layout_is_as_documented() {
    let bytes = encoded();
    let head = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
    assert_eq!(&bytes[..8], b"MGCHUNK1");
    assert_eq!(bytes[12..20], [2, 0, 0, 0, 2, 0, 0, 0]);
    let lists = &bytes[20 + head..];
    assert_eq!(
        lists[..16],
        [0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 1, 0, 0, 0]
    );
    let second = &lists[16 + 48..16 + 96];
    assert_eq!(second[..32], [2; 32]);
    assert_eq!(
        second[32..],
        [232, 3, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(lists[112..], [3, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn every_cut_and_every_excess_is_refused() {
    let bytes = encoded();
    for end in 0..bytes.len() {
        assert!(decode(&bytes[..end]).is_err(), "{end}");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(matches!(decode(&longer), Err(BadIndex::Length { .. })));
}

#[test]
fn no_changed_byte_goes_unseen_or_harms() {
    let bytes = encoded();
    let head = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
    // Digests, numbers and counts are covered; places may be others within the pack, and are found out by the chunk's digest.
    for at in (0..20).chain(20 + head..20 + head + 16) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x41;
        assert!(decode(&changed).is_err(), "{at}");
    }
}

#[test]
fn places_that_cannot_be_are_refused() {
    let with = |change: fn(&mut Vec<Place>)| {
        let mut places = places();
        change(&mut places);
        decode(&ChunkIndex::encode(&record(), &places, &[]).unwrap())
    };
    for (what, change) in [
        (
            "behind the pack",
            (|p| p[1].offset = 1001) as fn(&mut Vec<Place>),
        ),
        ("an offset that overflows", |p| p[1].offset = u64::MAX),
        ("no such pack", |p| p[0].pack = 1),
        ("empty", |p| p[0].length = 0),
        ("longer than plain", |p| p[1].length = 4097),
        ("nobody's", |p| {
            p.push(Place {
                digest: Digest([9; 32]),
                ..p[0]
            })
        }),
    ] {
        assert!(matches!(with(change), Err(BadIndex::Stored(_))), "{what}");
    }
}

#[test]
fn another_image_is_refused() {
    let other = ChunkIndex::decode(&encoded(), Digest([8; 32]), "app:1", &[5096]);
    assert!(matches!(other, Err(BadIndex::OtherImage(MANIFEST))));
}

#[test]
fn uses_of_chunks_that_are_not_there_are_refused() {
    let bytes = ChunkIndex::encode(&record(), &places(), &[4]).unwrap();
    assert!(matches!(decode(&bytes), Err(BadIndex::Use(4))));
}

#[test]
fn the_short_last_chunk_is_never_a_whole_one() {
    let mut record = record();
    record.chunks[3] = record.chunks[0];
    record.erofs_digest = ImageRecord::digest_of(record.erofs_size, CHUNK, &record.chunks);
    let bytes = ChunkIndex::encode(&record, &places()[..1], &[]).unwrap();
    assert!(matches!(decode(&bytes), Err(BadIndex::Place(3))));
}
