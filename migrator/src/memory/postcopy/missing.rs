//! The set of pages that the guest lacks, in memory and in a file that outlives the service.
//!
//! The file lies in a file system in memory, as the guest does: what ends the one ends the other. It may say of a page that it is
//! missing although it is not: two threads that place pages of the same word may write the word in the wrong order, and a service
//! may be killed between the page and the word. Such a page is asked for and not placed again. It never errs the other way: the
//! word is written after the page is in place.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use vm_runtime::units::{PageIndex, PageRange};

use super::bits::Bits;

/// First bytes of the file: its kind and version.
const MAGIC: &[u8; 8] = b"mmiss1\n\0";
/// Bytes before the first word: the magic and the number of pages.
const HEAD: u64 = 16;

/// The file of missing pages cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// Reading or writing failed.
    #[error("cannot {verb} {}: what the guest lacks could not be found again after a restart", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not a file of ours, or of another guest.
    #[error("{} is damaged, or does not belong to a guest of {pages} pages", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Pages of the guest.
        pages: u64,
    },
}

/// Pages that are missing. All methods may be called from several threads.
#[derive(Debug)]
pub struct MissingSet {
    missing: Bits,
    /// Asked for over the present link.
    asked: Bits,
    left: AtomicU64,
    file: File,
    path: PathBuf,
}

impl MissingSet {
    /// An empty set for a guest of `pages` pages, with a new file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(path: &Path, pages: u64) -> Result<Self, SetError> {
        let failed = |source| file_error("create", path, source);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(failed)?;
        let set = Self::empty(path, pages, file);
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&pages.to_le_bytes());
        head.resize(HEAD as usize + words(pages) * 8, 0);
        set.file.write_all_at(&head, 0).map_err(failed)?;
        Ok(set)
    }

    /// The set that an earlier service left; `None` if it left none.
    ///
    /// # Errors
    /// The file cannot be read, or is not that of a guest of `pages` pages.
    pub fn load(path: &Path, pages: u64) -> Result<Option<Self>, SetError> {
        let failed = |source| file_error("read", path, source);
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        let set = Self::empty(path, pages, file);
        let mut content = vec![0; HEAD as usize + words(pages) * 8];
        set.file.read_exact_at(&mut content, 0).map_err(failed)?;
        let (head, words) = content.split_at(HEAD as usize);
        if head[..8] != *MAGIC || head[8..] != pages.to_le_bytes() {
            let path = path.to_owned();
            return Err(SetError::Damaged { path, pages });
        }
        let (words, _) = words.as_chunks::<8>();
        let left = set
            .missing
            .set_words(words.iter().map(|word| u64::from_le_bytes(*word)));
        set.left.store(left, Ordering::SeqCst);
        Ok(Some(set))
    }

    fn empty(path: &Path, pages: u64, file: File) -> Self {
        Self {
            missing: Bits::new(pages),
            asked: Bits::new(pages),
            left: AtomicU64::new(0),
            file,
            path: path.to_owned(),
        }
    }

    /// Adds the pages of `range` that lie within RAM. In the file they are after [`Self::store`]. Not beside [`Self::remove`]: the file
    /// could forget them.
    pub fn insert(&self, range: PageRange) {
        let new = self.missing.insert(range);
        self.left.fetch_add(new, Ordering::SeqCst);
    }

    /// Writes the whole set to the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store(&self) -> Result<(), SetError> {
        let words: Vec<u8> = self.words().iter().flat_map(|w| w.to_le_bytes()).collect();
        self.file
            .write_all_at(&words, HEAD)
            .map_err(|source| file_error("write", &self.path, source))
    }

    /// Takes pages out that have been placed; how many of them were in it.
    ///
    /// # Errors
    /// The file cannot be written; the set is right all the same.
    pub fn remove(&self, range: PageRange) -> Result<u64, SetError> {
        let mut words = Vec::new();
        let removed = self
            .missing
            .remove(range, |word| words.extend_from_slice(&word.to_le_bytes()));
        if removed == 0 {
            return Ok(0);
        }
        let at = HEAD + range.start.0 / 64 * 8;
        let written = self.file.write_all_at(&words, at);
        // Whoever sees none left may remove the file.
        self.left.fetch_sub(removed, Ordering::SeqCst);
        written
            .map(|()| removed)
            .map_err(|source| file_error("write", &self.path, source))
    }

    /// Whether a page is missing.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.missing.contains(page)
    }

    /// Notes that a page is asked for; whether nobody had over this link.
    pub fn ask(&self, page: PageIndex) -> bool {
        self.asked.insert(PageRange::new(page.0, page.0 + 1)) == 1
    }

    /// The link is a new one, over which nothing has been asked for.
    pub fn forget_asked(&self) {
        self.asked.clear();
    }

    /// How many pages are missing.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::SeqCst)
    }

    /// The set as words of 64 pages, lowest bit first.
    pub fn words(&self) -> Vec<u64> {
        self.missing.words()
    }

    /// Removes the file: nothing is missing, or the guest is gone.
    pub fn remove_file(&self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the file of missing pages is not removed");
        }
    }
}

/// Words of a set for so many pages.
fn words(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

fn file_error(verb: &'static str, path: &Path, source: io::Error) -> SetError {
    SetError::File {
        verb,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 300;

    fn pages_of(words: &[u64]) -> BTreeSet<u64> {
        let bits = |(index, word): (usize, &u64)| {
            let word = *word;
            (0..64)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| index as u64 * 64 + bit)
        };
        words.iter().enumerate().flat_map(bits).collect()
    }

    proptest! {
        #[test]
        fn it_is_a_set_and_so_is_its_file(changes in prop::collection::vec((any::<bool>(), 0u64..320, 0u64..130), 0..30)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("missing");
            let set = MissingSet::create(&path, PAGES).unwrap();
            let mut model = BTreeSet::new();
            for (insert, start, len) in changes {
                let range = PageRange::new(start, start + len);
                let within: BTreeSet<u64> = (start..start + len).filter(|page| *page < PAGES).collect();
                if insert {
                    set.insert(range);
                    set.store().unwrap();
                    model.extend(&within);
                } else {
                    let had = model.intersection(&within).count() as u64;
                    prop_assert_eq!(set.remove(range).unwrap(), had);
                    model.retain(|page| !within.contains(page));
                }
                prop_assert_eq!(set.left(), model.len() as u64);
                prop_assert_eq!(&pages_of(&set.words()), &model);
                let found = MissingSet::load(&path, PAGES).unwrap().unwrap();
                prop_assert_eq!(&pages_of(&found.words()), &model);
                prop_assert_eq!(found.left(), set.left());
            }
            for page in 0..PAGES {
                prop_assert_eq!(set.contains(PageIndex(page)), model.contains(&page));
            }
        }
    }

    #[test]
    fn a_page_is_asked_for_once_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let set = MissingSet::create(&dir.path().join("missing"), PAGES).unwrap();
        assert!(set.ask(PageIndex(7)));
        assert!(!set.ask(PageIndex(7)));
        set.forget_asked();
        assert!(set.ask(PageIndex(7)));
        assert!(!set.ask(PageIndex(PAGES + 64)), "beyond RAM");
    }

    #[test]
    fn threads_that_share_words_never_make_the_file_forget_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing");
        let set = MissingSet::create(&path, PAGES).unwrap();
        set.insert(PageRange::new(0, PAGES));
        set.store().unwrap();
        std::thread::scope(|scope| {
            for first in 0..4 {
                let set = &set;
                scope.spawn(move || {
                    for page in (first..PAGES - 10).step_by(4) {
                        set.remove(PageRange::new(page, page + 1)).unwrap();
                    }
                });
            }
        });
        assert_eq!(set.left(), 10);
        let found = pages_of(&MissingSet::load(&path, PAGES).unwrap().unwrap().words());
        assert!(
            (PAGES - 10..PAGES).all(|page| found.contains(&page)),
            "{found:?}"
        );
    }

    #[test]
    fn a_file_of_another_guest_is_refused_and_no_file_is_no_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing");
        assert!(MissingSet::load(&path, PAGES).unwrap().is_none());
        MissingSet::create(&path, PAGES).unwrap();
        let refused = MissingSet::load(&path, PAGES + 1);
        assert!(
            matches!(refused, Err(SetError::Damaged { .. })),
            "{refused:?}"
        );
        std::fs::write(&path, b"short").unwrap();
        assert!(MissingSet::load(&path, PAGES).is_err());
    }
}
