//! Puts the kernel programs' object where `include_bytes!` finds it. `cargo xtask build` makes it.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-env-changed=SEALANE_EBPF_OBJECT");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let object = env::var_os("SEALANE_EBPF_OBJECT")
        .map_or_else(|| manifest.join("../target/ebpf/bpfel-unknown-none/release/capture"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    let out = Path::new(&env::var_os("OUT_DIR").unwrap_or_default()).join("capture");
    if let Err(error) = fs::copy(&object, &out) {
        println!("cargo::error=no kernel programs at {} ({error}): run `cargo xtask build` first", object.display());
    }
}
