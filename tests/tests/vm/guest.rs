//! Guests of 300 bytes: PID 1 counts on the console, and writes to memory, takes it and gives it back, or keeps a processor busy.
//!
//! They are assembled into this test itself, so that the VM is tested without the agent, an image
//! or any tool.

use std::arch::global_asm;
use std::path::{Path, PathBuf};

/// Pages that the guest writes in each of its rounds.
pub const WRITTEN_PAGES: u64 = 512;
/// Where it is loaded.
const BASE: u64 = 0x40_0000;
/// ELF header and one program header.
const HEADERS: u64 = 64 + 56;

// Round after round: one word into each page, `tick N` to the console, 10 ms of sleep.
global_asm!(
    r#"
    .pushsection .rodata
    .globl tiny_guest_start
    .globl tiny_guest_end
tiny_guest_start:
    lea rbx, [rip + tiny_guest_end]
    add rbx, 4095
    and rbx, -4096
    xor r12d, r12d
2:  inc r12
    mov ecx, 512
    mov rdi, rbx
3:  mov [rdi], r12
    add rdi, 4096
    dec ecx
    jnz 3b
    mov rsi, rsp
    dec rsi
    mov byte ptr [rsi], 10
    mov rax, r12
    mov r8d, 10
4:  xor edx, edx
    div r8
    add dl, 48
    dec rsi
    mov [rsi], dl
    test rax, rax
    jnz 4b
    sub rsi, 5
    mov dword ptr [rsi], 0x6b636974
    mov byte ptr [rsi + 4], 32
    mov rdx, rsp
    sub rdx, rsi
    mov edi, 1
    mov eax, 1
    syscall
    push 10000000
    push 0
    mov rdi, rsp
    xor esi, esi
    mov eax, 35
    syscall
    add rsp, 16
    jmp 2b
tiny_guest_end:
    .popsection
    "#
);

// Round after round: five million turns of a loop, `tick N` to the console, no sleep.
global_asm!(
    r#"
    .pushsection .rodata
    .globl busy_guest_start
    .globl busy_guest_end
busy_guest_start:
    xor r12d, r12d
2:  inc r12
    mov ecx, 5000000
3:  dec ecx
    jnz 3b
    mov rsi, rsp
    dec rsi
    mov byte ptr [rsi], 10
    mov rax, r12
    mov r8d, 10
4:  xor edx, edx
    div r8
    add dl, 48
    dec rsi
    mov [rsi], dl
    test rax, rax
    jnz 4b
    sub rsi, 5
    mov dword ptr [rsi], 0x6b636974
    mov byte ptr [rsi + 4], 32
    mov rdx, rsp
    sub rdx, rsi
    mov edi, 1
    mov eax, 1
    syscall
    jmp 2b
busy_guest_end:
    .popsection
    "#
);

/// Bytes that [`Program::Hog`] takes and gives back.
pub const HOG_BYTES: u64 = 128 << 20;

// Loads each module that /list names, one name after the other with a zero behind it. Then, round after round: takes 128 MiB,
// writes a word into each page, `tick N` with an odd N; four seconds later gives it back, `tick N` with an even N, and sleeps for six.
global_asm!(
    r#"
    .pushsection .rodata
    .globl hog_guest_start
    .globl hog_guest_end
hog_guest_start:
    lea rbx, [rip + hog_guest_end]
    add rbx, 4095
    and rbx, -4096
    lea rdi, [rip + 9f]
    xor esi, esi
    mov eax, 2
    syscall
    mov edi, eax
    mov rsi, rbx
    mov edx, 4095
    xor eax, eax
    syscall
2:  cmp byte ptr [rbx], 0
    je 5f
    mov rdi, rbx
    xor esi, esi
    mov eax, 2
    syscall
    mov edi, eax
    lea rsi, [rip + 8f]
    xor edx, edx
    mov eax, 313
    syscall
3:  inc rbx
    cmp byte ptr [rbx - 1], 0
    jne 3b
    jmp 2b
5:  xor r12d, r12d
6:  xor edi, edi
    mov esi, 0x8000000
    mov edx, 3
    mov r10d, 0x22
    mov r8, -1
    xor r9d, r9d
    mov eax, 9
    syscall
    mov r13, rax
    mov ecx, 32768
    mov rdi, rax
7:  mov [rdi], rdi
    add rdi, 4096
    dec ecx
    jnz 7b
    mov r14d, 4
    call 12f
    mov rdi, r13
    mov esi, 0x8000000
    mov eax, 11
    syscall
    mov r14d, 6
    call 12f
    jmp 6b
9:  .asciz "/list"
8:  .byte 0
12: inc r12
    mov rbp, rsp
    mov rsi, rsp
    dec rsi
    mov byte ptr [rsi], 10
    mov rax, r12
    mov r8d, 10
4:  xor edx, edx
    div r8
    add dl, 48
    dec rsi
    mov [rsi], dl
    test rax, rax
    jnz 4b
    sub rsi, 5
    mov dword ptr [rsi], 0x6b636974
    mov byte ptr [rsi + 4], 32
    mov rdx, rbp
    sub rdx, rsi
    mov edi, 1
    mov eax, 1
    syscall
    push 0
    push r14
    mov rdi, rsp
    xor esi, esi
    mov eax, 35
    syscall
    add rsp, 16
    ret
hog_guest_end:
    .popsection
    "#
);

unsafe extern "C" {
    static hog_guest_start: u8;
    static hog_guest_end: u8;
    static tiny_guest_start: u8;
    static tiny_guest_end: u8;
    static busy_guest_start: u8;
    static busy_guest_end: u8;
}

/// What a guest does.
#[derive(Clone, Copy, Debug)]
pub enum Program {
    /// Writes a word into each of [`WRITTEN_PAGES`], counts, and sleeps for 10 ms.
    Writes,
    /// Keeps one processor busy, and counts.
    Busy,
    /// Loads all modules, takes [`HOG_BYTES`] and gives them back, over and over: its count is odd while it has them.
    Hog,
}

fn code(program: Program) -> &'static [u8] {
    let (start, end) = match program {
        Program::Writes => (&raw const tiny_guest_start, &raw const tiny_guest_end),
        Program::Busy => (&raw const busy_guest_start, &raw const busy_guest_end),
        Program::Hog => (&raw const hog_guest_start, &raw const hog_guest_end),
    };
    // SAFETY: both symbols bound one run of read-only bytes of this very binary.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

/// Writes an initramfs (newc cpio, see the kernel's buffer-format.rst) whose `/init` it is, with these modules.
pub fn write_initramfs(path: &Path, program: Program, modules: &[PathBuf]) -> std::io::Result<()> {
    let mut archive = Vec::new();
    entry(&mut archive, "dev", 0o04_0755, (0, 0), &[]);
    entry(&mut archive, "dev/console", 0o02_0600, (5, 1), &[]);
    entry(&mut archive, "init", 0o10_0755, (0, 0), &elf(code(program)));
    let mut list = String::new();
    for (index, module) in modules.iter().enumerate() {
        let content = std::fs::read(module)?;
        entry(
            &mut archive,
            &format!("m{index}"),
            0o10_0644,
            (0, 0),
            &content,
        );
        list.push_str(&format!("/m{index}\0"));
    }
    entry(&mut archive, "list", 0o10_0644, (0, 0), list.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    std::fs::write(path, archive)
}

fn elf(code: &[u8]) -> Vec<u8> {
    let file = HEADERS + code.len() as u64;
    let mut elf = Vec::new();
    // ELF64, little endian, System V; executable, x86-64.
    elf.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable, writable, executable; zeroed memory behind it to write to.
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let memory = file + (WRITTEN_PAGES + 1) * 4096;
    for word in [0, BASE, BASE, file, memory, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, (major, minor): (u32, u32), data: &[u8]) {
    let inode = archive.len() as u32 + 1;
    let size = data.len() as u32;
    let name_size = name.len() as u32 + 1;
    let fields = [
        inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0,
    ];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    pad(archive);
    archive.extend(data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}
