//! Memory that knows what it must hold: blocks of pseudo-random words, rewritten generation by generation. Pure.
//!
//! Every word of a block follows from the block's number and its generation, so a check needs nothing but the table of
//! generations, and names the first wrong byte. The table has a checksum of its own. Blocks are no whole pages: a page
//! that is lost, or that an older version has overwritten, spoils what lies on both sides of a border.
//!
//! ```text
//! word 0     number of the block, with a mark
//!      1     generation
//!      2     checksum of all other words
//!      3..   content
//! ```
//!
//! Only `std`: the workload is compiled from this file by `rustc` alone.

use std::fmt;

/// Marks the first word of each block.
const MARK: u64 = 0xb10c_0000_0000_0000;
/// Words of a block before its content.
const HEADER: usize = 3;
/// Where the checksum is.
const SUM: usize = 2;
/// Bytes of a word.
const WORD: usize = size_of::<u64>();
/// Words by which sizes of blocks differ: 1 KiB.
const STEP: usize = 1024 / WORD;
/// Steps of the smallest and of the largest block: 4 KiB and 256 KiB.
const STEPS: std::ops::RangeInclusive<u64> = 4..=256;

/// The finaliser of SplitMix64: every bit of the argument moves every bit of the result.
pub const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The `index`th number of the SplitMix64 generator with this seed.
pub const fn nth(seed: u64, index: u64) -> u64 {
    mix(seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// One block's place, and what it must hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) start: usize,
    pub(super) words: usize,
    pub(super) generation: u64,
}

impl Entry {
    /// Its share of the table's checksum.
    fn sum(&self, block: usize) -> u64 {
        let place = mix(self.start as u64) ^ mix(!(self.words as u64));
        mix(mix(block as u64 ^ MARK) ^ place ^ mix(self.generation).rotate_left(17))
    }
}

/// A run of memory, cut into blocks.
#[derive(Clone, Debug)]
pub struct Arena {
    seed: u64,
    /// Tests spoil it, and the table.
    pub(super) words: Vec<u64>,
    pub(super) table: Vec<Entry>,
    table_sum: u64,
}

/// Memory that does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The table of generations has changed by itself.
    Table {
        /// Checksum of the table when it was last written.
        expected: u64,
        /// Its checksum now.
        found: u64,
    },
    /// A block differs from what was last written to it.
    Block {
        /// Its number.
        block: usize,
        /// The generation that it must be of.
        generation: u64,
        /// The first wrong word, in bytes from the block's start.
        offset: usize,
        /// The same, in bytes from the start of the memory.
        at: usize,
        /// What the word must be.
        expected: u64,
        /// What it is.
        found: u64,
        /// How many of its words are wrong.
        wrong_words: usize,
        /// What the memory looks like instead.
        looks: Looks,
    },
}

/// What a wrong block looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looks {
    /// A whole block, but another one, or of another generation.
    Whole {
        /// The number that it bears.
        block: u64,
        /// The generation that it bears.
        generation: u64,
    },
    /// Zero from its first word to its last.
    Zero,
    /// Neither: its checksum is wrong.
    Torn,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table { expected, found } => write!(
                f,
                "the table of generations has checksum {found:016x} where {expected:016x} belongs"
            ),
            Self::Block {
                block,
                generation,
                offset,
                at,
                expected,
                found,
                wrong_words,
                looks,
            } => {
                write!(
                    f,
                    "block {block} of generation {generation} has {wrong_words} wrong words, the first at byte {offset} \
                     (byte {at} of the memory): {found:016x} where {expected:016x} belongs; it "
                )?;
                match looks {
                    Looks::Whole { block, generation } => {
                        write!(f, "is block {block} of generation {generation}, whole")
                    }
                    Looks::Zero => f.write_str("is zero"),
                    Looks::Torn => f.write_str("is torn: its own checksum is wrong"),
                }
            }
        }
    }
}

impl std::error::Error for Fault {}

impl Arena {
    /// Takes about so many bytes, and fills all of them. Two arenas of different seeds have nothing in common.
    pub fn new(seed: u64, bytes: usize) -> Self {
        let mut left = bytes / WORD;
        let mut table = Vec::new();
        let mut start = 0;
        while left >= STEP * *STEPS.start() as usize {
            let span = STEPS.end() - STEPS.start() + 1;
            let steps = STEPS.start() + nth(!seed, table.len() as u64) % span;
            let words = (steps as usize * STEP).min(left);
            table.push(Entry {
                start,
                words,
                generation: 0,
            });
            start += words;
            left -= words;
        }
        let mut arena = Self {
            seed,
            words: vec![0; start],
            table_sum: 0,
            table,
        };
        arena.table_sum = arena.sum_table();
        for block in 0..arena.table.len() {
            arena.rewrite(block);
        }
        arena
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.table.len()
    }

    /// How many bytes they have.
    pub fn bytes(&self) -> usize {
        self.words.len() * WORD
    }

    /// Compares every word of a block with what it must be; how many bytes that were.
    ///
    /// # Errors
    /// It differs.
    pub fn verify(&self, block: usize) -> Result<usize, Fault> {
        let entry = self.table[block];
        let words = &self.words[entry.start..entry.start + entry.words];
        let content = content(self.seed, block, entry.generation);
        let header = [MARK ^ block as u64, entry.generation, words[SUM]];
        let fits = words[..HEADER] == header
            && words[HEADER..]
                .iter()
                .enumerate()
                .all(|(index, word)| *word == nth(content, index as u64))
            // Last, because nearly nothing that is right so far can be wrong here: only the checksum itself.
            && words[SUM] == checksum(words);
        if fits {
            return Ok(words.len() * WORD);
        }
        Err(self.fault(block, entry, words))
    }

    /// Writes the next generation into a block; how many bytes that were.
    pub fn rewrite(&mut self, block: usize) -> usize {
        let mut entry = self.table[block];
        self.table_sum ^= entry.sum(block);
        entry.generation += 1;
        self.table_sum ^= entry.sum(block);
        self.table[block] = entry;
        let words = &mut self.words[entry.start..entry.start + entry.words];
        fill(words, self.seed, block, entry.generation);
        words.len() * WORD
    }

    /// Checks the table of generations.
    ///
    /// # Errors
    /// It has changed since it was last written.
    pub fn verify_table(&self) -> Result<(), Fault> {
        let found = self.sum_table();
        if found == self.table_sum {
            return Ok(());
        }
        Err(Fault::Table {
            expected: self.table_sum,
            found,
        })
    }

    fn sum_table(&self) -> u64 {
        let entries = self.table.iter().enumerate();
        entries.fold(0, |sum, (block, entry)| sum ^ entry.sum(block))
    }

    fn fault(&self, block: usize, entry: Entry, words: &[u64]) -> Fault {
        let mut right = vec![0; words.len()];
        fill(&mut right, self.seed, block, entry.generation);
        let mut wrong = (0..words.len()).filter(|index| words[*index] != right[*index]);
        let first = wrong.next().unwrap_or(SUM);
        Fault::Block {
            block,
            generation: entry.generation,
            offset: first * WORD,
            at: (entry.start + first) * WORD,
            expected: right[first],
            found: words[first],
            wrong_words: 1 + wrong.count(),
            looks: if words.iter().all(|word| *word == 0) {
                Looks::Zero
            } else if words[SUM] == checksum(words) {
                Looks::Whole {
                    block: words[0] ^ MARK,
                    generation: words[1],
                }
            } else {
                Looks::Torn
            },
        }
    }
}

/// The seed of a block's content.
fn content(seed: u64, block: usize, generation: u64) -> u64 {
    mix(seed ^ mix(block as u64 ^ MARK) ^ mix(generation).rotate_left(29))
}

fn fill(words: &mut [u64], seed: u64, block: usize, generation: u64) {
    let content = content(seed, block, generation);
    words[0] = MARK ^ block as u64;
    words[1] = generation;
    for (index, word) in words[HEADER..].iter_mut().enumerate() {
        *word = nth(content, index as u64);
    }
    words[SUM] = checksum(words);
}

/// Over all words but the checksum itself; one multiplication a word, and words that change places change it.
fn checksum(words: &[u64]) -> u64 {
    let step =
        |sum: u64, word: &u64| (sum.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    let sum = words[..SUM].iter().fold(words.len() as u64, step);
    words[HEADER..].iter().fold(sum, step)
}
