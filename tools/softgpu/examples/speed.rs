//! Prints how long the machine takes for a warp instruction of some kinds, with all checks on:
//! `cargo run --release -p softgpu --example speed`.

use softgpu::card::Card;
use softgpu::machine::{Launch, Options, run};
use softgpu::memory::{Kind, Memory};
use softgpu::ptx;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let body = [
        (
            "mix",
            "add.s32 %r1, %r1, %r2; fma.rn.f32 %f1, %f1, %f2, %f3; setp.lt.u32 %p1, %r1, %r3; selp.b32 %r4, %r1, %r2, %p1;",
        ),
        ("add.s64", "add.s64 %rd1, %rd1, %rd2;"),
        ("ex2", "ex2.approx.ftz.f32 %f1, %f2;"),
        ("shfl", "shfl.sync.bfly.b32 %r1, %r2, 16, 31, -1;"),
        ("st.shared.u32", "st.shared.u32 [%at], %r1;"),
        ("ld.shared.u32", "ld.shared.u32 %r1, [%at];"),
        ("ld.shared.v4", "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%at4];"),
        ("ldmatrix", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%at4];"),
        ("ld.global.v4", "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%to];"),
        ("ld.global.nc.v4", "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%to];"),
        ("st.global.u32", "st.global.u32 [%to], %r1;"),
        (
            "mma",
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%f1,%f2,%f3,%f4};",
        ),
    ];
    let card = Card::find("h200").ok_or("no card")?;
    for (name, statements) in body {
        let repeated = statements.repeat(32);
        let per_turn = statements.matches(';').count() * 32 + 3;
        let text = format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p) {{ .reg .b32 %r<9>; .reg .f32 %f<9>;\n\
             .reg .b64 %rd<9>; .reg .b64 %to; .reg .pred %p<3>; .reg .b32 %n, %at, %at4; .shared .align 16 .b8 words[512];\n\
             ld.param.u64 %to, [p]; mov.u32 %n, %tid.x; shl.b32 %at, %n, 2; shl.b32 %at4, %n, 4; mad.wide.u32 %to, %n, 16, %to;\n\
             mov.u32 %r1, words; add.u32 %at, %at, %r1; add.u32 %at4, %at4, %r1;\n\
             mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 9; mov.u32 %r4, 0; mov.f32 %f1, 0f00000000; mov.f32 %f2, 0f3F000000;\n\
             mov.f32 %f3, %f1; mov.f32 %f4, %f1; mov.u64 %rd1, 0; mov.u64 %rd2, 1;\n\
             st.shared.v4.u32 [%at4], {{%r1, %r2, %r3, %r4}}; bar.sync 0; mov.u32 %n, 2000;\n\
             again: {repeated} sub.u32 %n, %n, 1; setp.ne.u32 %p2, %n, 0; @%p2 bra again; ret; }}"
        );
        let memory = Memory::new(card);
        let module = ptx::load(&text, card)?;
        let to = memory.allocate(512, Kind::Device, "out")?;
        memory.set(to, 0, 512)?;
        let kernel = module.kernel("k").ok_or("no kernel")?;
        let launch = Launch {
            kernel,
            grid: [1; 3],
            block: [32, 1, 1],
            shared: 0,
            params: to.to_le_bytes().to_vec(),
            dependent: false,
        };
        let best = (0..5)
            .map(|_| {
                let start = Instant::now();
                run(std::slice::from_ref(&launch), &memory, card, &Options::default())
                    .map(|_| start.elapsed())
            })
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .min()
            .ok_or("no run")?;
        println!("{name:16} {:6.1} ns", best.as_secs_f64() * 1e9 / (2000 * per_turn) as f64);
    }
    Ok(())
}
