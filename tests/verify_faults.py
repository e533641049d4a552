r"""Classes of answers that verifiers get wrong, each with its smallest inputs and variants of them.

FAULTS: class -> rows (gold, answers that are right, answers that are wrong).
FAULT_RESPONSES: class -> rows (gold, responses that are right, responses that are wrong).
NO_ANSWERS, ANSWERS: golds that hold the place of an answer, and words that look like them.
"""

FAULTS = {
    "words without braces and case": [
        (
            "2^{n+1}",
            ["2^{n+1},", "2^{n+1}{}", r"2^{\text{n+1}}", "2^{n+1}\\ "],
            ["2^n+1", "2^n+1,"],
        ),
        ("2^{n+1}", [], ["2^n+1{}", r"2^n+1\text{}", "2^n+1}", "{2^n}+1,", "2^n+1;", "2^n+1:"]),
        ("A-a", ["-a+A", "A-a;"], ["a-A", "a-A,", "a-A{}", r"a-A\text{}", "a-A:"]),
        (
            "0.5",
            [r"\frac{1}{2},", r"\frac{1}{2};", r"{}\frac{1}{2}"],
            [r"\frac{1}{2}}", r"\frac{1}{2}{2}"],
        ),
        ("42", [r"\text{42}", "42{}"], ["4{2}", r"4\text{2}", r"21{2}", r"42\text{1}", r"\{42"]),
        (r"\text{ellipse}", ["Ellipse", "ELLIPSE,", "ellipse;"], ["elipse", "an ellipse"]),
        (r"\text{CO}", ["CO"], ["Co", "co"]),
        ("ABCD", ["ABCD,"], ["abcd", "ABCd"]),
        (r"\text{(C)}", ["C", "(C)"], [r"\text{(C", r"\text(C)}", r"\text{(C)}1"]),
    ],
    "delimiters of formulas": [
        ("1000", [r"\(1,000\)", r"\[1,000\]", r"\( 1{,}000 \)"], [r"\(1,0\)"]),
        (r"\( 3, 5 \)", ["3,5", "5,3", r"\(3, 5\)", r"\[ 3, 5 \]"], ["(3,5)", "[3,5]", "35"]),
        ("(3,5)", [r"\((3,5)\)", r"\[(3, 5)\]"], [r"\(3, 5\)", r"\[3, 5\]", r"\((5,3)\)"]),
    ],
    "words as units": [
        (
            "3",
            ["3 inches", r"3\text{ cm}", "3 blue marbles"],
            [r"3\text{i}", r"3\mathrm{i}", r"3\text{x}"],
        ),
        ("3", [], ["3 cubed", r"3\text{ divided by }x", r"3\text{ divided by two}", "3 recurring"]),
        ("3i", [r"3\text{i}", r"3\mathrm{i}"], ["3", "3j"]),
        ("1", [], ["1 sixth", "1 seventh", "1 twenty-fifth", "1 millionth", r"1\text{ nth}"]),
        ("5", ["5 students", "5 years old"], ["5 thousands", "5 billion", "5 dozen", "5 tenfold"]),
        ("5", ["5个", "5 元", r"5\text{个}"], ["5万", "5千", "5分之一", "5 roughly", "5 per"]),
    ],
    "units that differ": [
        (
            r"5\text{ kg}",
            ["5", "5 kg", "5 kilograms", r"5\mathrm{kg}"],
            [r"5\text{ g}", "6 kg", "5 lb"],
        ),
        (r"5\text{ cm}^2", ["5 square centimeters", "5 sq cm"], [r"5\text{ cm}", r"5\text{ cm}^3"]),
        ("60 mph", ["60 miles per hour", r"60\text{ mi/h}"], ["60 km/h", "60 miles", "60 kph"]),
        (r"5\text{ m/s}", [r"5\frac{\text{m}}{\text{s}}"], [r"5\text{ m/s^2}", r"5\text{ m}"]),
        ("30^\\circ", ["30 degrees", "30"], ["30 radians", "30 cm"]),
        (r"20^\circ C", ["20", "20°C"], [r"20^\circ F", "21^\\circ C"]),
        (r"\$5", ["5 dollars", "5 USD", "5"], ["5 cents", "€5", "£5"]),
        ("5 apples", ["5 red apples", "5 apple"], ["5 oranges", "5 students"]),
        (r"x=5\text{ kg}", ["5", "5 kg", "x=5"], ["5 g", r"x=5\text{ g}"]),
        (r"28\%", ["28 pct", "28 percent", r"28\text{ per cent}", "0.28"], ["29 pct", "2.8"]),
    ],
    "long operator names": [
        (
            r"\arctan 2",
            [r"\operatorname{arctan} 2", r"\mathrm{arctan}\,2"],
            [r"\operatorname{arcsin} 2", "2"],
        ),
        (r"\operatorname{ln}(3)", [r"\ln 3", r"\text{ln}(3)"], [r"\operatorname{log} 3", "3"]),
    ],
    "options with words": [
        (
            "D",
            ["(D) 12", r"\textbf{(D)}\ 12", r"\textbf{(D) }12", "D. 12", "option D"],
            ["(C)", "(A) D", "2D"],
        ),
        (
            "(B) 12",
            ["B", "(B)", "12", r"\text{B}", r"\mathrm{(B)}~12"],
            ["C", "(C) 12", "(B) 13", "13", "2"],
        ),
        (r"\text{(A) east}", ["A", "east", "(A) east"], ["west", "(B) east", "(A) west"]),
    ],
    "codes": [
        ("2024-05-17", ["2024-05-17"], ["2002", "2024", "17"]),
        ("(1)(3)", ["(1), (3)", "(1) and (3)", "①③"], ["3", "1", "13"]),
        ("555-123-4567", ["555-123-4567"], ["-4135"]),
        ("05/17/2024", ["05/17/2024"], ["5/34408"]),
        ("3:05", ["3:05"], ["3:5", "3/5"]),
        ("90-5", ["85"], ["90-05"]),
    ],
    "names of assignments": [
        (
            "a=1, b=2",
            ["(a=1, b=2)", "(b=2, a=1)", "b=2, a=1", "(a,b)=(1,2)", "(1,2)"],
            ["(b=1, a=2)"],
        ),
        (
            "a=1, b=2",
            [r"\begin{cases}a=1\\b=2\end{cases}"],
            ["b=1,a=2", "(2,1)", "2,1", "(b,a)=(1,2)", "c=1,d=2"],
        ),
        ("x_1=2, x_2=5", ["5,2", "x_2=5,x_1=2"], ["x_1=5,x_2=2", "2,6"]),
    ],
    "null delimiters": [
        ("5", [r"\left.5\right.", r"\left. 5 \right."], [".5", r"\left..5\right."]),
        ("0.5", [r"\left..5\right.", r"\left.\frac12\right."], [r"\left.5\right."]),
    ],
    "wrappers": [
        (
            "1/2",
            [r"\mathbf{\frac{1}{2}}", r"\textcolor{red}{\frac{1}{2}}", r"{\color{red} \frac12}"],
            [],
        ),
        (
            "1/2",
            [r"\text{$\frac{1}{2}$}", r"**\frac12**", r"\begin{aligned}\frac12\end{aligned}"],
            [],
        ),
        (
            "1/2",
            [r"\underline{\mathbf{\frac12}}", r"{\Large \frac12}", r"\colorbox{yellow}{$\frac12$}"],
            [],
        ),
        ("1/2", [], [r"\mathbf{1}\mathbf{2}", r"\textcolor{1}{2}", r"\hphantom{1/}2"]),
        (
            "5",
            [r"\begin{aligned}x&=2+3\\&=5\end{aligned}", r"\hspace{1cm}5"],
            [r"\begin{aligned}x&=5\\y&=6\end{aligned}"],
        ),
        (
            "2^{n+1}",
            [r"\mathbf{2}^{n+1}", r"2^{\mathbf{n+1}}"],
            [r"2^\mathbf{n}+1", r"\mathbf{2^n}+1"],
        ),
    ],
    "notation": [
        (
            r"\mathbb{R}\setminus\{2\}",
            ["x \\ne 2", "(-\\infty,2)\\cup(2,\\infty)", "x \\not= 2"],
            ["2", "x=2", "(2,\\infty)"],
        ),
        (
            r"\{x\in\mathbb{R}\mid x>2\}",
            ["x>2", "(2,\\infty)"],
            [r"\{x\in\mathbb{Z}\mid x>2\}", "x\\ge2"],
        ),
        (r"{1 \over 2}", ["1/2", r"1 \over 2"], ["2", r"{2 \over 1}", "12"]),
        (
            r"0.\dot{1}4285\dot{7}",
            [r"\frac17", r"0.\overline{142857}"],
            ["0.142857", r"0.\dot{1}4285\dot{8}"],
        ),
        (
            r"\text{all real numbers}",
            [r"\mathbb{R}", "(-\\infty,\\infty)"],
            ["all integers", r"\mathbb{Q}"],
        ),
        (r"(0,5)\cup(3,9)", ["(0,9)", r"(0,3]\cup(2,9)"], ["[0,9)", "(0,5)", "(3,9)"]),
        (r"(0,5)\cap(3,9)", ["(3,5)", "3<x<5"], ["(0,9)", "[3,5)"]),
        (r"[0,4]\setminus(1,2)", [r"[0,1]\cup[2,4]"], ["[0,4]", r"[0,1)\cup(2,4]"]),
        (r"x\ne 3, x\ne -3", [r"x\ne\pm3", r"\mathbb{R}\setminus\{-3,3\}"], ["x\\ne 3", "3,-3"]),
        ("(0,9)", [], [r"(0,4)\cup(4,9)", r"[-\infty,9)\cap(0,\infty)"]),
    ],
    "labels": [
        ("f(x)=2x", ["2x", "f(x)=x+x"], ["x", "g(x)=2x", "f(x)=x", "f=2", "2"]),
        ("|AB|=1", ["1", "|AB|=1"], ["2", "|AC|=1", "-1"]),
        ("S_1:S_2=7:32", ["7:32", "7/32", "14:64"], ["32:7", "7", "S_2:S_1=7:32"]),
        ("y=x^2+2x+1", ["x^2+2x+1", "(x+1)^2", "y-1=x^2+2x"], ["x=y^2+2y+1", "z=x^2+2x+1", "x^2"]),
        (r"P(X=2)=\frac{3}{8}", ["3/8", "P(X=2)=0.375"], ["2", "P(X=3)=3/8"]),
        (r"\text{Area}=12", ["12", "A=12"], [r"\text{Perimeter}=12", "13"]),
        (
            "5",
            ["AB=5", "f(1)=5", r"\angle A=5"],
            ["x+y=5", "xy=5", "x^2=5", "|x|=5", "2x=5", r"\sin x=5"],
        ),
        ("PV=nRT", ["nRT=PV"], ["nRT", "PV"]),
        ("x^2=4", ["2x^2=8"], ["4", "2", "x=2"]),
        ("SRAC=LRAC", ["SRAC = LRAC."], ["LRAC", "SRAC"]),
    ],
    "equations that are true": [
        (
            "16",
            ["7+9=16", "x=7+9=16", r"\sqrt{256}=16"],
            ["7+9=15", "x+9=16", "7+9=16x", "7=16"],
        ),
    ],
}

FAULT_RESPONSES = {
    "the answer tag": [
        (
            "B",
            ["<answer> B </answer>", "<answer>(B)</answer>", r"<answer>\boxed{B}</answer>"],
            ["<answer>A</answer>"],
        ),
        (
            "(1,2)",
            ["<answer> (1, 2) </answer>", "<answer>The point is $(1,2)$</answer>"],
            ["<answer>(2,1)</answer>"],
        ),
        ("42", ["so 7 <answer>42</answer> of 9", "<answer>1</answer> no: <answer>42</answer>"], []),
        (
            "2",
            ["<answer>x = 2</answer>"],
            ["<answer> (1, 2) </answer>", "<answer>2", "2 <answer>3</answer>"],
        ),
    ],
    "delimiters of formulas": [
        ("1000", [r"The answer is \(1,000\)."], []),
        ("(3,5)", [r"The answer is \((3, 5)\)."], [r"The answer is \(3, 5\)."]),
    ],
    "fractions and mixed numbers in prose": [
        (
            "3/4",
            ["So the probability is 3/4.", "so (3/4)."],
            ["So it is 4.", "it was on 3/4/2020."],
        ),
        ("4", [], ["So the probability is 3/4."]),
        (
            "5/2",
            ["It is 2 1/2 cups", "It is 2½ cups", "We need 2 \\frac{1}{2} cups."],
            ["It is 1/2 cups"],
        ),
        ("1/2", ["It is ½."], ["It is 2 1/2 cups", "It is 2½ cups"]),
    ],
    "glued numbers": [
        (
            "42",
            ["We have 7 items and the total is 42!", "7, so 42km", "7, 共42个。", "7, so 42m²"],
            [],
        ),
        (
            "7",
            [],
            [
                "We have 7 items and the total is 42!",
                "7, 共42个。",
                "7 so x^2 and 5x",
                "7, so it is 3!",
            ],
        ),
        ("5", [], ["it is 5² then", "it is 5!=120", "we get 5x"]),
    ],
    "anchors inside display mathematics": [
        (
            "9",
            [
                r"\[Answer: 009\]",
                r"\[ \text{Answer: } 9 \]",
                r"$\textbf{Answer: 9}$",
                "$$Answer: 9$$",
            ],
            [r"\[Answer: 90\]"],
        ),
    ],
    "options with words": [
        (
            "D",
            [
                "The answer is (D) because H is even.",
                "The answer is **(D)** 12",
                "The correct option is D.",
            ],
            [],
        ),
        (
            "D",
            ["Answer: D) 12", "The answer is D, since C is odd."],
            ["The answer is (C) because D is wrong."],
        ),
        ("A", [], ["The answer is a multiple of 3.", "The answer is A dog."]),
    ],
    "equations in words": [
        (
            "16",
            ["The answer is 7 + 9 = 16.", "#### 7+9=16"],
            ["The answer is 7 + 9 = 16 + 1.", "Answer: 7 + 9 = 16x"],
        ),
        (
            "2",
            [],
            [
                "the answer is 15 - 16 = 2 pieces",
                "the answer is 15 - 16 = 2 pieces that 4 kids ate",
            ],
        ),
        ("7", ["Answer: 20 - 13 = 7 apples were eaten by 3 kids"], ["Answer: 20 - 14 = 7 apples"]),
    ],
    "dashes of lists": [
        (
            "15",
            [
                "Total apples:\n- 15 apples",
                "Total apples:\n– 15 apples",
                "Answer:\n- 15",
                "Total – 15",
            ],
            ["it is -15"],
        ),
        (
            "-15",
            ["it is -15.", "it is \u221215", "x = - 15"],
            ["Total apples:\n- 15 apples", "Total – 15"],
        ),
    ],
}

NO_ANSWERS = r"""proof|Proof.|\text{proof}|notfound|not found|Not_Found|unknown|Answer: unknown
TBD|t.b.d.|TBA|N/A|null|NaN|undefined|see solution|See the proof above|proof omitted
no answer|???|-|...|answer not found|not available|to be determined|answers may vary|todo
placeholder|missing|QED|not applicable|none given"""
ANSWERS = r"""yes|no|none|No solution|infinitely many|does not exist|impossible|even|knot|Provence
blue|seesaw|prime|never|not prime|none of the above|increasing|\infty|\emptyset|Noah
cannot be determined"""
