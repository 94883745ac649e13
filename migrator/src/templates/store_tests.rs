use std::os::unix::fs::FileExt;
use std::time::Duration;

use vm_runtime::units::{Bytes, PAGE_SIZE, PageIndex};

use super::super::key::tests::vm;
use super::super::shape;
use super::*;

fn key(digit: char) -> Key {
    Key::parse(&digit.to_string().repeat(32)).unwrap()
}

fn ram() -> GuestMemory {
    GuestMemory::create("template-test", Bytes::mib(4)).unwrap()
}

fn guest() -> GuestMemory {
    let ram = ram();
    ram.write(PageIndex(3), &[7; 64 * PAGE_SIZE]).unwrap();
    ram
}

fn open(dir: &Path, limit: u64) -> Templates {
    Templates::open(dir.join("templates"), TemplateMode::Auto, limit).unwrap()
}

fn install(templates: &Templates, key: &Key) -> Template {
    let qemu = "7.2.0".to_owned();
    templates
        .install(key, shape(&vm()), qemu, &guest(), b"a device state")
        .unwrap()
}

fn starts(templates: &Templates, key: &Key) -> Result<bool, TemplateError> {
    let Some(opened) = templates.start(key)? else {
        return Ok(false);
    };
    assert_eq!(opened.state(), b"a device state");
    opened.fill(&ram()).map(|()| true)
}

#[test]
fn a_template_is_found_by_its_key_also_by_the_next_service() {
    let dir = tempfile::tempdir().unwrap();
    let templates = open(dir.path(), 1 << 30);
    assert!(!starts(&templates, &key('a')).unwrap() && templates.wants(&key('a')));
    let made = install(&templates, &key('a'));
    assert_eq!(made.file.pages, 64);
    assert!(starts(&templates, &key('a')).unwrap() && !templates.wants(&key('a')));
    templates.used(&key('a'));
    assert_eq!(templates.list().unwrap()[0].starts, 1);
    let templates = open(dir.path(), 1 << 30);
    assert!(starts(&templates, &key('a')).unwrap());
    // Again is no error: the new one counts.
    install(&templates, &key('a'));
    assert_eq!(templates.list().unwrap().len(), 1);
    templates.remove(&key('a')).unwrap();
    assert!(matches!(
        templates.remove(&key('a')),
        Err(TemplateError::NotFound(_))
    ));
    assert_eq!(
        fs::read_dir(dir.path().join("templates")).unwrap().count(),
        0
    );
}

#[test]
fn damage_to_any_of_its_files_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let templates = open(dir.path(), 1 << 30);
    for (file, at) in [(STATE, 3), (MEMORY, 5 * PAGE_SIZE as u64), (FILE, 0)] {
        install(&templates, &key('a'));
        let path = dir.path().join("templates").join(key('a').as_str());
        let file = File::options().write(true).open(path.join(file)).unwrap();
        file.write_all_at(b"!", at).unwrap();
        assert!(starts(&templates, &key('a')).is_err());
        templates.remove(&key('a')).unwrap();
    }
}

#[test]
fn what_an_earlier_service_left_unfinished_goes_when_the_next_one_starts() {
    let dir = tempfile::tempdir().unwrap();
    let templates = open(dir.path(), 1 << 30);
    install(&templates, &key('a'));
    let half = templates.unfinished().unwrap().keep();
    fs::write(half.join(MEMORY), "half").unwrap();
    let templates = open(dir.path(), 1 << 30);
    assert!(!half.exists());
    assert_eq!(templates.list().unwrap().len(), 1);
}

#[test]
fn the_least_recently_used_makes_room_for_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let one = install(&open(dir.path(), 1 << 30), &key('a')).allocated;
    let templates = open(dir.path(), 2 * one + one / 2);
    install(&templates, &key('b'));
    // As if it had been used an hour later.
    let file = dir.path().join("templates").join(key('a').as_str());
    let file = File::open(file.join(FILE)).unwrap();
    let later = SystemTime::now() + Duration::from_secs(3600);
    file.set_modified(later).unwrap();
    install(&templates, &key('c'));
    let left: Vec<Key> = templates
        .list()
        .unwrap()
        .into_iter()
        .map(|t| t.key)
        .collect();
    assert_eq!(left, [key('a'), key('c')]);
    // One alone may be larger than the limit: else it would be made again and again.
    let tight = open(dir.path(), 1);
    install(&tight, &key('d'));
    let left: Vec<Key> = tight.list().unwrap().into_iter().map(|t| t.key).collect();
    assert_eq!(left, [key('d')]);
}

#[test]
fn a_shape_that_no_template_can_be_made_of_is_not_tried_again_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let templates = open(dir.path(), 1 << 30);
    templates.give_up(&key('a'));
    assert!(!templates.wants(&key('a')) && templates.wants(&key('b')));
    install(&templates, &key('a'));
    templates.remove(&key('a')).unwrap();
    assert!(templates.wants(&key('a')));
    let manual = Templates::open(dir.path().join("templates"), TemplateMode::Manual, 1).unwrap();
    assert!(manual.is_on() && !manual.wants(&key('b')));
}

#[test]
fn only_starts_in_a_row_that_take_too_long_condemn_a_template() {
    let dir = tempfile::tempdir().unwrap();
    let templates = open(dir.path(), 1 << 30);
    install(&templates, &key('a'));
    assert!(!templates.late(&key('a')) && !templates.late(&key('a')));
    templates.used(&key('a'));
    assert!(!templates.late(&key('a')) && !templates.late(&key('a')));
    assert!(!templates.late(&key('b')));
    // One that was made anew begins anew.
    install(&templates, &key('a'));
    assert!(!templates.late(&key('a')) && !templates.late(&key('a')));
    assert!(templates.late(&key('a')));
}
