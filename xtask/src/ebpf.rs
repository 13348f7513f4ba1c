//! The kernel programs' object, `target/ebpf/bpfel-unknown-none/release/capture`.
//!
//! It needs a rustc that has, or can build, `core` for `bpfel-unknown-none`, and bpf-linker. Two compilers do: the
//! distribution's own with its prebuilt `core`, and rustup's nightly with `rust-src`.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host::{self, can_install, cargo, install, output, root, run, say, which};

const TARGET: &str = "bpfel-unknown-none";
const DISTRIBUTION: &str = "/usr/bin/rustc";
const LINKER: &str = "0.13.0";
const LLVM: &str = "22";

enum Compiler {
    Distribution,
    Nightly,
}

/// Builds the object, installing what it lacks as root on Debian.
pub fn build() -> Result<()> {
    let compiler = compiler()?;
    linker(&compiler)?;
    say("building the kernel programs");
    // Always in the workspace's own target directory, whatever CARGO_TARGET_DIR says: the agent's build looks there.
    let target_dir = root().join("target/ebpf");
    let mut command = match compiler {
        Compiler::Distribution => {
            let mut command = cargo();
            // aya-ebpf uses asm_experimental_arch, which is not stable.
            command.env("RUSTC", DISTRIBUTION).env("RUSTC_BOOTSTRAP", "1").arg("build");
            command
        }
        Compiler::Nightly => {
            let mut command = nightly("cargo");
            command.current_dir(root()).args(["build", "-Z", "build-std=core"]);
            command
        }
    };
    command
        .env("PATH", env::join_paths(host::search_path())?)
        .env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf -C linker=bpf-linker")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .args(["--release", "--package", "sealane-ebpf", "--target", TARGET, "--target-dir"])
        .arg(target_dir);
    run(&mut command).context("the kernel programs do not build")
}

fn compiler() -> Result<Compiler> {
    if distribution_has_core() {
        return Ok(Compiler::Distribution);
    }
    if nightly_has_source() {
        return Ok(Compiler::Nightly);
    }
    if can_install() {
        install(&["rustc-web", "libstd-rust-web-dev-bpf"])?;
        if distribution_has_core() {
            return Ok(Compiler::Distribution);
        }
    }
    bail!(
        "no compiler for the kernel programs; run: rustup toolchain install nightly --component rust-src \
         (on Debian as root this command installs the distribution's own)"
    )
}

fn distribution_has_core() -> bool {
    let libraries = output(Command::new(DISTRIBUTION).args(["--target", TARGET, "--print", "target-libdir"]));
    libraries.is_ok_and(|dir| Path::new(dir.trim()).is_dir())
}

fn nightly_has_source() -> bool {
    let sysroot = output(nightly("rustc").args(["--print", "sysroot"]));
    sysroot.is_ok_and(|root| Path::new(root.trim()).join("lib/rustlib/src/rust/library/core").is_dir())
}

/// A tool of rustup's nightly, without the toolchain that runs us.
fn nightly(tool: &str) -> Command {
    let mut command = Command::new("rustup");
    for variable in ["RUSTUP_TOOLCHAIN", "RUSTC", "RUSTDOC", "CARGO"] {
        command.env_remove(variable);
    }
    command.args(["run", "nightly", tool]);
    command
}

/// bpf-linker reads the compiler's bitcode: it must be built with an LLVM at least as new as the compiler's.
fn linker(compiler: &Compiler) -> Result<()> {
    if which("bpf-linker").is_some() {
        return Ok(());
    }
    match compiler {
        Compiler::Distribution if can_install() => {
            install(&[&format!("llvm-{LLVM}-dev"), "libzstd-dev", "zlib1g-dev"])?;
            say("building bpf-linker (about a minute, once)");
            let feature = format!("llvm-{LLVM}");
            run(cargo().env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM}")).args([
                "install",
                "--quiet",
                "bpf-linker",
                "--version",
                LINKER,
                "--no-default-features",
                "--features",
                &feature,
            ]))
        }
        Compiler::Distribution => bail!(
            "bpf-linker is missing; install LLVM {LLVM} with its headers, then run: LLVM_PREFIX=/usr/lib/llvm-{LLVM} cargo \
             install bpf-linker --version {LINKER} --no-default-features --features llvm-{LLVM}"
        ),
        Compiler::Nightly => bail!("bpf-linker is missing; run: cargo install bpf-linker --version {LINKER}"),
    }
}
