fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // ORT unloads a plugin after its last session. Code that a thread pool or a late destructor may still reach, and the
    // operator tables that we hand out for good, must outlive that.
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
